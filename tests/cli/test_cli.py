"""The command as a user runs it: output, exit codes, the JSON contract."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nanotron_fast as nf
from nanotron_fast.checkpoints.options import VerifyChoices
from nanotron_fast.cli.commands import app
from nanotron_fast.cli.manifest import check
from nanotron_fast.errors import ConfigError

COMMAND = [sys.executable, "-m", "nanotron_fast"]
DRY_RUN_KEYS = {
    "family",
    "model_class",
    "direction",
    "topology",
    "dtype",
    "num_parameters",
    "tensor_files",
    "bytes_read",
    "bytes_written",
    "peak_memory_bytes",
    "layer_stages",
    "warnings",
}
CONVERT_KEYS = DRY_RUN_KEYS | {"seconds", "gigabytes_per_second", "peak_rss_bytes", "destination"}


def run(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True)
    assert result.returncode == code, result.stderr + result.stdout
    assert "Traceback" not in result.stderr
    return result


def test_help_names_every_option() -> None:
    text = subprocess.run(
        [*COMMAND, "convert", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "160"},
    ).stdout
    options = (
        "to tp pp dtype model-class family target rope-interleaved checkpoint-version "
        "pad-vocab-to-multiple-of vocab-size max-shard-size tokenizer like ignore-tensors "
        "workers fsync io manifest overwrite dry-run json quiet"
    )
    for option in options.split():
        assert f"--{option}" in text


def test_dry_run_as_json_is_the_contract_and_writes_nothing(
    tmp_path: Path, golden_hf: Path
) -> None:
    out = tmp_path / "out"
    result = run("convert", golden_hf, out, "--tp", 2, "--pp", 2, "--dry-run", "--json")
    document = json.loads(result.stdout)
    assert set(document) == DRY_RUN_KEYS
    assert result.stderr == ""
    assert document["family"] == "llama"
    assert document["model_class"] == "LlamaConfig"
    assert document["direction"] == "nanotron"
    assert document["topology"] == {"tp": 2, "pp": 2, "ep": 1}
    assert document["dtype"] == "bf16"
    assert document["num_parameters"] == 238144
    assert document["tensor_files"] == 45
    assert document["bytes_read"] == 2 * 238144
    assert document["layer_stages"] == [0, 0, 0, 1]
    assert 10e6 < document["peak_memory_bytes"] < 300e6
    assert list(tmp_path.iterdir()) == []


def test_dry_run_for_people(tmp_path: Path, golden_hf: Path) -> None:
    text = run("convert", golden_hf, tmp_path / "out", "--pp", 2, "--dry-run").stdout
    for line in ("llama (LlamaConfig)", "238,144 in bf16", "TP=1 PP=2", "stage 1: layers 3"):
        assert line in text


def test_convert_as_json(tmp_path: Path, golden_hf: Path) -> None:
    result = run("convert", golden_hf, tmp_path / "out", "--json")
    document = json.loads(result.stdout)
    assert set(document) >= CONVERT_KEYS
    assert result.stderr == ""
    assert document["destination"] == str(tmp_path / "out")
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert document["bytes_written"] == written
    assert 0 < document["peak_rss_bytes"] < 300e6


def test_convert_verify_inspect(tmp_path: Path, golden_hf: Path) -> None:
    out = tmp_path / "out"
    assert "GB/s, peak memory" in run("convert", golden_hf, out, "--tp", 4).stdout
    assert run("verify", golden_hf, out).stdout == "equal: 39 tensors, 476 kB\n"
    shown = run("inspect", out).stdout
    assert "Nanotron" in shown
    assert "TP=4 PP=1" in shown
    document = json.loads(run("inspect", out, "--json").stdout)
    assert document["format"] == "nanotron"
    assert document["topology"] == {"tp": 4, "pp": 1, "ep": 1}
    assert json.loads(run("inspect", golden_hf, "--json").stdout)["family"] == "llama"


def test_quiet_leaves_the_exit_code(
    tmp_path: Path, golden_hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    nf.convert(golden_hf, out, manifest=True)
    nf.convert(golden_hf, other, dtype="fp16")
    lost = shutil.copytree(out, tmp_path / "lost")
    next(lost.rglob("model_weight*.safetensors")).unlink()
    for words, code in (
        (["inspect", out], 0),
        (["inspect", lost], 0),
        (["inspect", tmp_path], 2),
        (["verify", golden_hf, out], 0),
        (["verify", out, lost], 1),
        (["verify", out], 0),
        (["verify", lost], 1),
    ):
        try:
            app([*map(str, words), "--quiet"])
            found = 0
        except SystemExit as stop:
            found = stop.code
        printed = capsys.readouterr()
        assert (found, printed.out) == (code, ""), words
        assert bool(printed.err) == (code == 2)


def test_quiet_says_nothing(tmp_path: Path, golden_hf: Path) -> None:
    result = run("convert", golden_hf, tmp_path / "out", "--quiet")
    assert (result.stdout, result.stderr) == ("", "")


def test_a_difference_is_exit_code_1(tmp_path: Path, golden_hf: Path) -> None:
    run("convert", golden_hf, tmp_path / "out")
    path = tmp_path / "out/model/model/final_layer_norm/pp_block/model_weight.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert (
        "differs: model.norm.weight: 1 of 64"
        in run("verify", golden_hf, tmp_path / "out", code=1).stdout
    )
    document = json.loads(run("verify", golden_hf, tmp_path / "out", "--json", code=1).stdout)
    assert document["equal"] is False
    assert [item["name"] for item in document["differing"]] == ["model.norm.weight"]
    assert set(document) == {"equal", "tensors_compared", "differing", "casts"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert", "/no/such/place", "OUT"], "/no/such/place: no such directory"),
        (["convert", "HF", "OUT", "--tp", "3"], "8 heads do not split over tp=3"),
        (["convert", "HF", "OUT", "--pp", "9"], "pp=9: 4 layers fill"),
        (["convert", "HF", "OUT", "--dtype", "int8"], "choose keep, bf16, fp16 or fp32"),
        (["convert", "HF", "OUT", "--to", "onnx"], "choose nanotron or hf"),
        (["convert", "HF", "OUT", "--to", "hf"], "is a Hugging Face checkpoint already"),
        (["convert", "HF", "OUT", "--max-shard-size", "1GB"], "--max-shard-size: it has no"),
        (["convert", "HF", "OUT", "--workers", "0"], "--workers"),
        (["convert", "HF", "OUT", "--nonsense"], "--nonsense"),
        (["convert", "HF"], "dst"),
        (["verify", "HF", "/no/such/place"], "no such directory"),
        (["inspect", "/no/such/place"], "no such directory"),
    ],
    ids=lambda value: " ".join(value[:1] + value[2:]) if isinstance(value, list) else "",
)
def test_bad_input_is_exit_code_2(
    words: list[str], message: str, tmp_path: Path, golden_hf: Path
) -> None:
    places = {"HF": str(golden_hf), "OUT": str(tmp_path / "out")}
    result = run(*(places.get(word, word) for word in words), code=2)
    assert message.lower() in result.stderr.lower()
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_an_error_with_json_leaves_stdout_empty(tmp_path: Path) -> None:
    result = run("convert", "/no/such/place", tmp_path / "out", "--json", code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")


def test_a_hub_id_that_cannot_be_had_says_so(tmp_path: Path) -> None:
    result = subprocess.run(
        [*COMMAND, "convert", "nobody/nothing", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
    )
    assert result.returncode == 2
    assert "nobody/nothing: no such directory, and it cannot be had from the Hub" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_hub_id_comes_from_the_cache(tmp_path: Path, golden_hf: Path) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "home"
    snapshot = home / "hub" / "models--someone--llama" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for path in golden_hf.iterdir():
        (snapshot / path.name).symlink_to(path)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(revision)
    subprocess.run(
        [*COMMAND, "convert", "someone/llama", str(tmp_path / "out"), "--quiet"],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)},
    )
    run("verify", golden_hf, tmp_path / "out")


def test_a_terminal_gets_a_bar(tmp_path: Path, golden_hf: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "convert", str(golden_hf), str(tmp_path / "out")],
        stdout=subprocess.DEVNULL,
        stderr=slave,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            block = os.read(master, 4096)
        except OSError:
            break
        if not block:
            break
        shown += block
    os.close(master)
    assert process.wait() == 0
    assert b"converting" in shown


def test_the_console_script_is_the_module() -> None:
    script = Path(sys.executable).with_name("nanotron-fast")
    if not script.exists():
        pytest.skip("the package is not installed in this environment itself")
    version = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == run("--version").stdout


def test_an_unknown_instruction_set_is_bad_input(tmp_path: Path, golden_hf: Path) -> None:
    result = subprocess.run(
        [*COMMAND, "convert", str(golden_hf), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "NANOTRON_FAST_SIMD": "mmx"},
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: NANOTRON_FAST_SIMD: SIMD level 'mmx'")
    assert list(tmp_path.iterdir()) == []


def test_a_family_that_is_none_is_bad_input(golden_hf: Path) -> None:
    assert "--family nosuch" in run("inspect", golden_hf, "--family", "nosuch", code=2).stderr


def test_verify_with_one_checkpoint_names_what_rotted(tmp_path: Path, golden_hf: Path) -> None:
    out = tmp_path / "out"
    nf.convert(golden_hf, out, manifest=True)
    assert re.match(r"intact: 27 tensors in 27 files, \d+ kB\n", run("verify", out).stdout)
    path = next(iter(sorted(out.rglob("o_proj/*.safetensors"))))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    lines = run("verify", out, code=1).stdout.splitlines()
    assert lines[0].startswith(f"differs: data in {path.relative_to(out)}: its ")
    assert lines[1].startswith("damaged in 1 place: 27 tensors in 27 files, ")
    found = json.loads(run("verify", out, "--json", code=1).stdout)
    assert (found["intact"], found["tensors_checked"]) == (False, 27)
    assert found["findings"][0]["file"] == str(path.relative_to(out))
    assert "it has no nanotron_fast_manifest.json" in run("verify", golden_hf, code=2).stderr
    for logits, choices in ((True, VerifyChoices()), (False, VerifyChoices(family="llama"))):
        with pytest.raises(ConfigError, match="it has no meaning without a second checkpoint"):
            check(str(out), logits=logits, choices=choices, workers=1, is_quiet=True)
