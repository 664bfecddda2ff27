"""The way back from a checkpoint that Nanotron saved: no nanotron_fast.json says what it was."""

import json
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast
from nanotron_fast import Topology
from nanotron_fast.errors import CheckpointError, ConfigError, UnsupportedModelError
from tests.modelzoo import make, read_tensors

WINDOW: dict[str, Any] = {
    "use_sliding_window": True,
    "sliding_window": 16,
    "max_window_layers": 0,
}
EXTENDED: dict[str, Any] = {
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "attention_bias": True,
    "head_dim": 12,
}
# Family, changes to its config, options of the way there -> the family that is found.
FOUND: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "llama": ("llama", {}, {}, "llama"),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, {}, "llama"),
    "llama-as-qwen2": ("llama", {}, {"model_class": "qwen2"}, "llama"),
    "llama-interleaved": ("llama", {}, {"rope_interleaved": True}, "llama"),
    "llama-1.2": ("llama", {}, {"checkpoint_version": "1.2"}, "llama"),
    "mistral": ("mistral", {}, {}, "llama"),
    "mistral-window": ("mistral", {"sliding_window": 16}, {}, "mistral"),
    "qwen2": ("qwen2", {}, {}, "qwen2"),
    "qwen2-window": ("qwen2", WINDOW, {}, "qwen2"),
    "qwen2-interleaved": ("qwen2", {}, {"rope_interleaved": True}, "qwen2"),
    "smollm3": ("smollm3", {}, {}, "smollm3"),
    "smollm3-untied": ("smollm3", {"tie_word_embeddings": False}, {}, "smollm3"),
    "smollm3-rope-everywhere": ("smollm3", {"no_rope_layers": [1] * 6}, {}, "llama"),
    "qwen2_moe": ("qwen2_moe", {}, {}, "qwen2_moe"),
    "qwen2_moe-no-bias": ("qwen2_moe", {"qkv_bias": False}, {}, "qwen2_moe"),
    "qwen2_moe-some-dense": ("qwen2_moe", {"mlp_only_layers": [0, 4]}, {}, "qwen2_moe"),
    "qwen2_moe-window": (
        "qwen2_moe",
        {**WINDOW, "layer_types": ["sliding_attention"] * 6},
        {},
        "qwen2_moe",
    ),
    "starcoder2": ("starcoder2", {}, {}, "starcoder2"),
    "starcoder2-window": ("starcoder2", {"sliding_window": 16}, {}, "starcoder2"),
}


def saved_by_nanotron(tmp_path: Path, family: str, changes: dict[str, Any], **options: Any) -> Any:
    """The model, and a Nanotron checkpoint of it without our side file."""
    model = make(family, **changes)
    source = model.save(tmp_path / "source")
    options = {"topology": Topology(tp=2, pp=2), **options}
    nanotron_fast.convert(source, tmp_path / "there", **options)
    (tmp_path / "there" / "nanotron_fast.json").unlink()
    return model, tmp_path / "there"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FOUND)
def test_the_family_that_is_found(name: str, tmp_path: Path) -> None:
    family, changes, options, found = FOUND[name]
    model, there = saved_by_nanotron(tmp_path, family, changes, **options)
    report = nanotron_fast.convert(there, tmp_path / "back")
    assert report.plan.family == found
    assert read_tensors(tmp_path / "back") == model.tensors
    config = read_json(tmp_path / "back" / "config.json")
    assert config["model_type"] == found
    # Version 1.2 keeps no rope_theta; nothing else that both families have may change.
    for key in config.keys() & model.config.keys():
        original = model.config[key]
        if key in ("bos_token_id", "eos_token_id") and original is None:
            original = {"bos_token_id": 1, "eos_token_id": 2}[key]  # Nanotron's default
        if key == "max_window_layers":
            continue  # without a window it says nothing
        if key == "initializer_range" and family == "starcoder2":
            continue  # the class keeps its default
        assert config[key] == original, key


@pytest.mark.parametrize(
    ("name", "override"),
    [("mistral", "mistral"), ("smollm3-rope-everywhere", "smollm3"), ("llama", "mistral")],
)
def test_family_option(name: str, override: str, tmp_path: Path) -> None:
    family, changes, options, _ = FOUND[name]
    model, there = saved_by_nanotron(tmp_path, family, changes, **options)
    nanotron_fast.convert(there, tmp_path / "back", family=override)
    assert read_tensors(tmp_path / "back") == model.tensors
    config = read_json(tmp_path / "back" / "config.json")
    assert config["model_type"] == override
    if override == "mistral":
        assert config["sliding_window"] is None
    else:
        assert config["no_rope_layers"] == [1] * 6


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("llama", "starcoder2", "--family starcoder2: model_config.json is a LlamaConfig"),
        ("llama", "qwen2", "--family qwen2: model_config.json is a LlamaConfig"),
        ("qwen2", "llama", "llama: the checkpoint has biases on q, k and v but not on the output"),
        ("qwen2", "mistral", "mistral: the checkpoint has biases on q, k and v"),
        ("qwen2", "qwen2_moe", "qwen2_moe: the checkpoint has no experts"),
        ("qwen2_moe", "qwen2", "qwen2: the checkpoint has experts"),
        ("smollm3", "llama", "llama: every layer has a rotary embedding"),
        ("mistral-window", "llama", r"llama: Hugging Face's class has no sliding window \(here 16"),
        ("mistral-window", "qwen2", "qwen2: the checkpoint has no biases on q, k and v"),
    ],
)
def test_family_option_that_cannot_be(
    name: str, override: str, message: str, tmp_path: Path
) -> None:
    family, changes, options, _ = FOUND[name]
    _, there = saved_by_nanotron(tmp_path, family, changes, **options)
    with pytest.raises(UnsupportedModelError, match=message):
        nanotron_fast.convert(there, tmp_path / "back", family=override)
    assert not (tmp_path / "back").exists()


def test_vocabulary_option(tmp_path: Path) -> None:
    model, there = saved_by_nanotron(
        tmp_path, "llama", {"vocab_size": 150}, pad_vocab_to_multiple_of=64
    )
    nanotron_fast.convert(there, tmp_path / "padded")
    assert read_tensors(tmp_path / "padded")["lm_head.weight"].shape == (192, 64)
    assert read_json(tmp_path / "padded" / "config.json")["vocab_size"] == 192
    nanotron_fast.convert(there, tmp_path / "back", vocab_size=150)
    assert read_tensors(tmp_path / "back") == model.tensors
    with pytest.raises(ConfigError, match="a vocabulary of 193 is larger than the 192 rows"):
        nanotron_fast.convert(there, tmp_path / "larger", vocab_size=193)


def test_special_tokens_reach_generation_config(tmp_path: Path) -> None:
    _, there = saved_by_nanotron(tmp_path, "llama", {"bos_token_id": 8, "eos_token_id": [5, 6]})
    nanotron_fast.convert(there, tmp_path / "back")
    generation = read_json(tmp_path / "back" / "generation_config.json")
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (8, 5)


def test_what_our_own_class_holds_needs_no_option(tmp_path: Path) -> None:
    model, there = saved_by_nanotron(tmp_path, "llama", EXTENDED, target="nanotron-fast")
    nanotron_fast.convert(there, tmp_path / "back")
    assert read_tensors(tmp_path / "back") == model.tensors
    config = read_json(tmp_path / "back" / "config.json")
    assert {key: config[key] for key in EXTENDED} == EXTENDED


def test_what_the_drop_in_honours_needs_its_target_again(tmp_path: Path) -> None:
    scaled = {"rope_scaling": EXTENDED["rope_scaling"]}
    model, there = saved_by_nanotron(tmp_path, "llama", scaled, target="nanotron-fast")
    with pytest.raises(
        UnsupportedModelError, match=r"rope_scaling 'linear'.*--target nanotron-fast"
    ):
        nanotron_fast.convert(there, tmp_path / "back")
    nanotron_fast.convert(there, tmp_path / "back", target="nanotron-fast")
    assert read_tensors(tmp_path / "back") == model.tensors
    config = read_json(tmp_path / "back" / "config.json")
    assert config["rope_scaling"] == scaled["rope_scaling"]


def test_rope_interleaved_by_version_option(tmp_path: Path) -> None:
    """A 1.2 config that was given a rope_theta by hand still rotates pairs, and need not say so."""
    model, there = saved_by_nanotron(tmp_path, "llama", {}, checkpoint_version="1.2")
    path = there / "model_config.json"
    path.write_text(json.dumps({**read_json(path), "rope_theta": 10000.0}))
    report = nanotron_fast.convert(there, tmp_path / "back", checkpoint_version="1.2")
    assert read_tensors(tmp_path / "back") == model.tensors
    assert not [text for text in report.plan.warnings if "no rope_interleaved" in text]


def test_config_edited_after_the_conversion_wins_over_the_side_file(tmp_path: Path) -> None:
    """Training may have lengthened the context; the rest comes from the side file."""
    model = make("llama", eos_token_id=[5, 6])
    nanotron_fast.convert(model.save(tmp_path / "source"), tmp_path / "there")
    path = tmp_path / "there" / "model_config.json"
    path.write_text(json.dumps({**read_json(path), "max_position_embeddings": 512}))
    report = nanotron_fast.convert(tmp_path / "there", tmp_path / "back")
    config = read_json(tmp_path / "back" / "config.json")
    assert config["max_position_embeddings"] == 512
    assert config["eos_token_id"] == [5, 6]
    assert any("max_position_embeddings" in warning for warning in report.plan.warnings)


def test_model_config_is_required(tmp_path: Path) -> None:
    _, there = saved_by_nanotron(tmp_path, "llama", {})
    (there / "model_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no model_config\.json"):
        nanotron_fast.convert(there, tmp_path / "back")
