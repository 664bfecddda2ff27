"""Commands that write: options that have no meaning or half of one, and what is said meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nanotron_fast.cli.commands import app
from nanotron_fast.cli.reporting import Progress
from tests.modelzoo import make

GOLDEN = Path(__file__).parents[1] / "golden" / "training" / "llama_tied_tp2_zero0" / "2"
# 34 MB in one layer: several blocks of 1 MiB for each of eight files.
LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 8192,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 64,
}
STORE = "s3://bucket/out"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make("llama", num_hidden_layers=2).save(tmp_path / "source")


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of a command."""
    try:
        app([str(word) for word in words], standalone_mode=True)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    out, err = capsys.readouterr()
    return code, out, err


def test_a_dry_run_of_a_share(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("convert", source, tmp_path / "out", "--tp", 2)
    planned = []
    for number in (1, 2, 3):
        share = ("--share", f"{number}/3")
        code, out, _ = run(capsys, *base, *share, "--dry-run", "--json")
        assert code == 0
        document = json.loads(out)["share"]
        assert (document["number"], document["of"]) == (number, 3)
        code, text, _ = run(capsys, *base, *share, "--dry-run")
        assert f"  share       {number} of 3: read " in text
        assert f" to {document['tensor_files']} files" in text
        assert "  beside      nothing; --finish writes " in text
        assert not (tmp_path / "out").exists()
        _, out, _ = run(capsys, *base, *share, "--json")
        (folder,) = tmp_path.glob("out.partial-*")
        written = [path for path in (folder / "content").rglob("*") if path.is_file()]
        assert {path.suffix for path in written} == {".safetensors"}
        assert document["tensor_files"] == len(written)
        assert document["bytes_written"] == sum(path.stat().st_size for path in written)
        planned.append(document)
        folder.rename(tmp_path / f"kept-{number}")
    code, out, _ = run(capsys, *base, "--dry-run", "--json")
    whole = json.loads(out)
    assert "share" not in whole
    for key in ("tensor_files", "bytes_read", "bytes_written"):
        assert sum(each[key] for each in planned) == whole[key]


@pytest.mark.parametrize("command", ["convert", "reshard"])
def test_one_of_many_processes_says_what_a_dry_run_comes_to(
    command: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under torchrun the first alone, and the processes are not connected for it."""
    src = source if command == "convert" else GOLDEN
    words = (command, src, tmp_path / "out", "--tp", 1, "--dry-run")
    alone = run(capsys, *words)
    assert (alone[0], bool(alone[1])) == (0, True)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, said in (("0", alone), ("1", (0, "", "")), ("2", (0, "", ""))):
        monkeypatch.setenv("RANK", rank)
        code, out, err = run(capsys, *words)
        # Memory differs from run to run.
        assert (code, out.splitlines()[:3], err) == (said[0], said[1].splitlines()[:3], said[2])
    monkeypatch.setenv("RANK", "first")
    said = "error: RANK is 'first' in the environment, and not a number\n"
    assert run(capsys, *words) == (2, "", said)


@pytest.mark.parametrize("option", ["--resume", "--overwrite-partial", "--finish"])
def test_a_dry_run_that_would_have_to_look_at_what_is_left(
    option: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "convert", source, tmp_path / "out", option, "--dry-run")
    assert (code, out) == (2, "")
    assert err == (
        f"error: {option}: it has no meaning with --dry-run, which does not look at what earlier "
        "runs have left\n"
    )
    if option != "--finish":
        code, _, again = run(capsys, "reshard", GOLDEN, tmp_path / "out", option, "--dry-run")
        assert (code, again) == (2, err)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--share", "4/3"), "--share 4/3: I of I/N is between 1 and N"),
        (("--io", "warp"), "--io warp: choose auto, buffered, direct or dontcache"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses(
    words: tuple[str, ...],
    said: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for more in ((), ("--dry-run",)):
        code, out, err = run(capsys, "convert", source, tmp_path / "out", *words, *more)
        assert (code, out, err) == (2, "", f"error: {said}\n")


@pytest.mark.parametrize(
    "option",
    [
        *(["--resume"], ["--overwrite-partial"], ["--share", "1/2"], ["--finish"], ["--fsync"]),
        *(["--manifest"], ["--io", "direct"]),
    ],
)
def test_what_has_no_meaning_in_a_store(
    option: list[str], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "convert", source, STORE, *option)
    said = f"error: {option[0]}: it is for a directory, and {STORE} is in a store\n"
    assert (code, out, err) == (2, "", said)
    if option[0] in ("--share", "--fsync", "--manifest", "--io"):
        assert run(capsys, "convert", source, STORE, *option, "--dry-run") == (2, "", said)


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--fsync"]])
def test_training_is_not_resharded_into_a_store(
    more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "reshard", GOLDEN, "s3://me:secret@bucket/out", *more)
    said = "error: s3://me@bucket/out: a training checkpoint is written to a directory alone\n"
    assert (code, out) == (2, "")
    assert err.endswith(said)
    assert "secret" not in err


def test_a_url_of_a_folder_to_reshard_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"file://{tmp_path}/out"
    code, _, _ = run(capsys, "reshard", GOLDEN, url, "--tp", 1, "--dry-run", "--quiet")
    assert code == 0
    code, _, _ = run(capsys, "reshard", GOLDEN, url, "--tp", 1, "--fsync", "--quiet")
    assert code == 0
    assert (tmp_path / "out" / "model_config.json").exists()


def test_what_others_have_named_is_told_in_its_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "a\x1b[2J.xyz").symlink_to("gone\nerror: b")
    code, out, err = run(capsys, "convert", source, tmp_path / "out")
    assert code == 0
    assert out.splitlines()[-1] == r"left behind: a\x1b[2J.xyz"
    assert r"a\x1b[2J.xyz is a link to gone\nerror: b, " in err
    assert err.count("\n") == 1


def test_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress(is_quiet=False)
    with progress.running("reading") as report:
        assert report is not None
        now[0] = 105.0
        # How much there is to do was not known before.
        report(0)
        progress.expect(8 * 10**9)
        for now[0], done in ((109.0, 1), (110.0, 2 * 10**9), (112.0, 3), (120.0, 8 * 10**9)):
            report(done)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 0 B, 0 B/s",
        "reading: 2.00 GB of 8.00 GB, 400 MB/s, 15 s left",
        "reading: 8.00 GB of 8.00 GB, 533 MB/s",
    ]


@pytest.mark.parametrize("io", ["buffered", "direct", "dontcache"])
def test_a_run_takes_no_more_memory_than_was_said(tmp_path: Path, io: str) -> None:
    source = make("llama", **LARGE).save(tmp_path / "source")
    command = (sys.executable, "-m", "nanotron_fast", "convert", source, tmp_path / "out")
    words = [*map(str, command), "--tp=8", "--workers=8", "--json", f"--io={io}"]

    def document(*more: str) -> dict[str, int]:
        result = subprocess.run([*words, *more], capture_output=True, check=True)
        found: dict[str, int] = json.loads(result.stdout)
        return found

    said = document("--dry-run")["peak_memory_bytes"]
    after = document()
    # The threads' stacks, and what a run imports besides.
    assert after["peak_rss_bytes"] < said + 12e6
    assert after["peak_rss_bytes"] < after["peak_memory_bytes"] + 12e6
