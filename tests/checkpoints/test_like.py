"""The way back after a training: a tokenizer, a configuration and a vocabulary from elsewhere."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import nanotron_fast
from nanotron_fast import Topology
from nanotron_fast.cli.scripts import convert_hf_to_nanotron, convert_nanotron_to_hf
from nanotron_fast.errors import CheckpointError, ConfigError
from tests.modelzoo import Model, make, read_tensors, write_json
from tests.refusals import refused

TOKENIZER = {"tokenizer.json": b'{"a": 1}', "tokenizer_config.json": b"{}"}
GENERATION = {"temperature": 0.6, "eos_token_id": [5, 6]}


def original(**changes: Any) -> Model:
    config = {"num_hidden_layers": 1, "vocab_size": 150, "eos_token_id": [5, 6], **changes}
    model = make("llama", **config)
    model.generation_config = dict(GENERATION)
    model.tokenizer = dict(TOKENIZER)
    return model


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    root = original().save(tmp_path / "hf")
    (root / "modeling_own.py").write_text("# own")
    return root


@pytest.fixture
def step(hf: Path, tmp_path: Path) -> Path:
    """What Nanotron saves after training: weights and configurations, nothing of ours."""
    nanotron_fast.convert(hf, tmp_path / "start", pad_vocab_to_multiple_of=64)
    names = ("model", "model_config.json", "checkpoint_metadata.json", "config.yaml")
    for name in names:
        path, copy = tmp_path / "start" / name, tmp_path / "run" / "10" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(path, copy) if path.is_dir() else shutil.copyfile(path, copy)
    return tmp_path / "run" / "10"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def edit_yaml(step: Path, **tokenizer: Any) -> None:
    document = yaml.safe_load((step / "config.yaml").read_text())
    document["tokenizer"] = tokenizer
    document["model"]["init_method"] = {"std": 0.02}
    (step / "config.yaml").write_text(yaml.safe_dump(document))


def test_like_restores_the_original(hf: Path, step: Path, tmp_path: Path) -> None:
    report = nanotron_fast.convert(step, tmp_path / "back", like=hf)
    assert report.plan.warnings == ()
    assert read_tensors(tmp_path / "back") == original().tensors
    assert read_json(tmp_path / "back" / "config.json") == read_json(hf / "config.json")
    assert read_json(tmp_path / "back" / "generation_config.json") == GENERATION
    for name, data in TOKENIZER.items():
        assert (tmp_path / "back" / name).read_bytes() == data
    assert (tmp_path / "back" / "modeling_own.py").is_file()


def test_like_needs_no_weights_and_takes_our_own_checkpoint(
    hf: Path, step: Path, tmp_path: Path
) -> None:
    (hf / "model.safetensors").unlink()
    for number, like in enumerate((hf, tmp_path / "start")):
        nanotron_fast.convert(step, tmp_path / f"{number}", like=str(like))
        config = read_json(tmp_path / f"{number}" / "config.json")
        assert (config["vocab_size"], config["eos_token_id"]) == (150, [5, 6])
        assert (tmp_path / f"{number}" / "tokenizer.json").is_file()


def test_without_it_what_cannot_be_known_is_said(step: Path, tmp_path: Path) -> None:
    report = nanotron_fast.convert(step, tmp_path / "back")
    (warning,) = report.plan.warnings
    for words in (
        "has no nanotron_fast.json",
        "one eos_token_id where the original may have had several",
        "all 192 rows of the vocabulary are written",
        f"--like {tmp_path / 'start'} takes them from the original",
    ):
        assert words in warning
    # The tokenizer is found through config.yaml, which names the folder that training began from.
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == TOKENIZER["tokenizer.json"]
    report = nanotron_fast.convert(step, tmp_path / "again", vocab_size=150)
    assert "rows" not in report.plan.warnings[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/model", r"no tokenizer is written.*config.yaml names org/model, which is no folder"),
        ("/gone", r"config.yaml names /gone, which is no folder here.*--tokenizer DIR_OR_ID"),
        (None, r"no tokenizer is written: none lies in .*10\. Give it with --tokenizer"),
        (7, r"none lies in .*10\. Give it with --tokenizer"),
        ("", r"none lies in .*10\. Give it with --tokenizer"),
    ],
)
def test_no_tokenizer_is_said(name: Any, message: str, step: Path, tmp_path: Path) -> None:
    edit_yaml(step, tokenizer_name_or_path=name)
    warnings = nanotron_fast.plan(step, tmp_path / "back").warnings
    assert re.search(message, warnings[0])
    assert "--like DIR_OR_ID" in warnings[1]


def test_a_tokenizer_is_looked_for_in_like_too(step: Path, hf: Path, tmp_path: Path) -> None:
    edit_yaml(step, tokenizer_name_or_path=None)
    for name in TOKENIZER:
        (hf / name).unlink()
    warnings = nanotron_fast.plan(step, tmp_path / "back", like=hf).warnings
    assert any(f"none lies in {step} and {hf}. Give it" in each for each in warnings)


SENSELESS = {
    "a: [": "not YAML: while parsing",
    "\0": "not YAML",
    "!!python/object:os.x {}": "not YAML: could not determine a constructor",
    "a: !!bool x": "not YAML",
    "a: !!timestamp x": "not YAML",
    "a: !!int ''": "not YAML",
    "a\n---\nb": "not YAML: expected a single document",
    "[" * 100_000: "nested more than 64 deep",
    "? " * 20_000: "nested more than 64 deep",
}


@pytest.mark.parametrize("text", SENSELESS, ids=lambda text: text[:20])
def test_a_training_configuration_that_cannot_be_read(
    text: str, step: Path, tmp_path: Path
) -> None:
    (step / "config.yaml").write_text(text)
    warning = nanotron_fast.plan(step, tmp_path / "back").warnings[0]
    assert "no tokenizer is written" in warning
    assert "config.yaml cannot be read (" in warning
    assert SENSELESS[text] in warning
    resharded = nanotron_fast.plan(step, tmp_path / "back", to="nanotron")
    assert any(SENSELESS[text] in each for each in resharded.warnings)


@pytest.mark.parametrize("text", ["- 1", "tokenizer: 7", "a: &a [*a]"])
def test_a_senseless_training_configuration(text: str, step: Path, tmp_path: Path) -> None:
    (step / "config.yaml").write_text(text)
    assert "no tokenizer is written" in nanotron_fast.plan(step, tmp_path / "back").warnings[0]


def test_a_tokenizer_given_goes_before_all_others(step: Path, hf: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.model").write_bytes(b"\x0a")
    (tmp_path / "other" / "modeling_of_theirs.py").write_bytes(b"")
    nanotron_fast.convert(step, tmp_path / "back", like=hf, tokenizer=tmp_path / "other")
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert {"tokenizer.model", "modeling_own.py", "generation_config.json"} <= names
    assert not {"tokenizer.json", "modeling_of_theirs.py"} & names


def test_a_tokenizer_given_on_the_way_there_is_named_in_config_yaml(tmp_path: Path) -> None:
    source = make("llama", num_hidden_layers=1).save(tmp_path / "bare")
    tokenizer = original().save(tmp_path / "hf")
    nanotron_fast.convert(source, tmp_path / "there", tokenizer=tokenizer)
    document = yaml.safe_load((tmp_path / "there" / "config.yaml").read_text())
    assert document["tokenizer"]["tokenizer_name_or_path"] == str(tmp_path / "there")
    assert (tmp_path / "there" / "tokenizer.json").read_bytes() == TOKENIZER["tokenizer.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 104}, "another shape .*intermediate_size 104 and 96"),
        ({"num_hidden_layers": 2}, "num_layers 2 and 1"),
        ({"num_key_value_heads": 2}, "num_kv_heads 2 and 4"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True and False"),
        ({"hidden_size": 128, "head_dim": 8}, "hidden_size 128 and 64"),
    ],
)
def test_like_of_another_shape(
    changes: dict[str, Any], message: str, step: Path, tmp_path: Path
) -> None:
    like = original(**changes).save(tmp_path / "like")
    refused(step, tmp_path, CheckpointError, f"--like {like}: .*{message}", like=like)


def test_like_of_a_larger_vocabulary(step: Path, tmp_path: Path) -> None:
    like = original(vocab_size=193).save(tmp_path / "like")
    message = f"--like {like}: a vocabulary of 193 is larger than the 192 rows"
    refused(step, tmp_path, ConfigError, message, like=like)


def test_like_that_is_no_model(step: Path, tmp_path: Path) -> None:
    (tmp_path / "like").mkdir()
    message = "--like .*like: it has no config.json and no nanotron_fast.json"
    refused(step, tmp_path, CheckpointError, message, like=tmp_path / "like")
    make("starcoder2", num_hidden_layers=1).save(tmp_path / "like")
    message = "it is a starcoder2, and .*10 is a LlamaConfig, which does not hold one"
    refused(step, tmp_path, CheckpointError, message, like=tmp_path / "like")


def test_like_means_nothing_on_the_way_there(hf: Path, tmp_path: Path) -> None:
    refused(hf, tmp_path, ConfigError, "--like: it has no meaning", like=hf)


def test_what_training_changed_goes_before_like(hf: Path, step: Path, tmp_path: Path) -> None:
    """Except for token ids, of which Nanotron keeps one, or its own default."""
    config = read_json(step / "model_config.json")
    write_json(step / "model_config.json", {**config, "rope_theta": 5e5, "eos_token_id": 9})
    report = nanotron_fast.convert(step, tmp_path / "back", like=hf)
    written = read_json(tmp_path / "back" / "config.json")
    assert (written["rope_theta"], written["eos_token_id"]) == (5e5, [5, 6])
    first, second = sorted(report.plan.warnings)
    assert f"eos_token_id is [5, 6] as in --like {hf}; model_config.json has 9" in first
    assert "rope_theta is 500000.0 as in model_config.json" in second


def test_the_scripts_take_them_too(
    hf: Path, step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"--checkpoint_path={step}", f"--save_path={tmp_path / 'back'}", f"--like={hf}"]
    monkeypatch.setattr("sys.argv", ["convert", *words, f"--tokenizer_name={hf}"])
    with pytest.raises(SystemExit, match=r"^0$"):
        convert_nanotron_to_hf.main()
    assert read_json(tmp_path / "back" / "config.json")["eos_token_id"] == [5, 6]
    words = [f"--checkpoint_path={hf}", f"--save_path={tmp_path / 'there'}", "--ignore_tensors=x*"]
    monkeypatch.setattr("sys.argv", ["convert", *words, f"--tokenizer_name={hf}"])
    with pytest.raises(SystemExit, match=r"^0$"):
        convert_hf_to_nanotron.main()
    assert (tmp_path / "there" / "tokenizer.json").is_file()


def test_a_topology_makes_no_difference(hf: Path, tmp_path: Path) -> None:
    nanotron_fast.convert(hf, tmp_path / "a", topology=Topology(tp=2), pad_vocab_to_multiple_of=64)
    (tmp_path / "a" / "nanotron_fast.json").unlink()
    nanotron_fast.convert(tmp_path / "a", tmp_path / "b", like=hf)
    assert nanotron_fast.verify(hf, tmp_path / "b").equal
