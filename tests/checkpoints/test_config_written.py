"""The `config.json` on the way back says what the Nanotron checkpoint computes, whatever was."""

import json
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast as nf
from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.families import family_of_config
from nanotron_fast.families.hf_config import read_config
from tests.modelzoo import make, write_json
from tests.refusals import refused


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def edit(path: Path, **changes: Any) -> None:
    document = {**read(path), **changes}
    write_json(path, {key: value for key, value in document.items() if value is not ...})


def moe(path: Path, **changes: Any) -> None:
    edit(path, moe_config={**read(path)["moe_config"], **changes})


def spec_of(root: Path) -> Any:
    config = read(root / "config.json")
    return read_config(family_of_config(config), config)


@pytest.mark.parametrize("window", [16, ...], ids=["sixteen", "by-default"])
def test_like_adds_no_window(window: Any, tmp_path: Path) -> None:
    """A LlamaConfig computes none, and has no field that could say so."""
    source = make("llama", num_hidden_layers=2).save(tmp_path / "hf")
    nf.convert(source, tmp_path / "step")
    (tmp_path / "step" / "nanotron_fast.json").unlink()
    changes: dict[str, Any] = {"rms_norm_eps": 1e-5, "sliding_window": window}
    like = make("mistral", num_hidden_layers=2, **changes).save(tmp_path / "like")
    report = nf.convert(tmp_path / "step", tmp_path / "back", like=like)
    config = read(tmp_path / "back" / "config.json")
    assert config["model_type"] == "mistral"
    assert config["sliding_window"] is None
    was = 4096 if window is ... else window
    assert any(
        f"sliding_window is None as in model_config.json; it was {was}" in warning
        for warning in report.plan.warnings
    )
    assert nf.verify(tmp_path / "step", tmp_path / "back").equal


def test_like_adds_no_scaling(tmp_path: Path) -> None:
    source = make("llama", num_hidden_layers=2).save(tmp_path / "hf")
    nf.convert(source, tmp_path / "step")
    (tmp_path / "step" / "nanotron_fast.json").unlink()
    scaling = {"rope_type": "linear", "factor": 2.0}
    like = make("llama", num_hidden_layers=2, rope_scaling=scaling).save(tmp_path / "like")
    report = nf.convert(tmp_path / "step", tmp_path / "back", like=like)
    assert spec_of(tmp_path / "back").rope_scaling is None
    assert any("rope_scaling is None as in model_config.json" in w for w in report.plan.warnings)


WINDOWED = {
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 0,
    "layer_types": ["sliding_attention"] * 6,
}
# Family, changes of the source's config, those of model_config.json, and what is read at the end.
CHANGED: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "window-dropped": ("qwen2", WINDOWED, {"sliding_window_size": None}, {"sliding_window": None}),
    "window-changed": ("qwen2", WINDOWED, {"sliding_window_size": 4}, {"sliding_window": 4}),
    "window-added": (
        "qwen2",
        {"layer_types": ["full_attention"] * 6},
        {"sliding_window_size": 4},
        {"sliding_window": 4},
    ),
    "window-dropped-plain": (
        "mistral",
        {"sliding_window": 8, "layer_types": ["sliding_attention"] * 6},
        {"sliding_window_size": None},
        {"sliding_window": None},
    ),
    "window-dropped-moe": (
        "qwen2_moe",
        WINDOWED,
        {"sliding_window_size": None},
        {"sliding_window": None},
    ),
    "window-dropped-starcoder2": (
        "starcoder2",
        {"sliding_window": 8},
        {"sliding_window_size": None},
        {"sliding_window": None},
    ),
    "rotary-everywhere": ("smollm3", {}, {"no_rope_layer": None}, {"no_rope_interval": None}),
    "rotary-by-interval": (
        "smollm3",
        {"no_rope_layers": ...},
        {"no_rope_layer": 2},
        {"no_rope_interval": 2},
    ),
    "theta": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_theta": 5e5},
        {"rope_theta": 5e5},
    ),
    "theta-inside": (
        "llama",
        {"text_config": {"rope_theta": 10000.0, "rms_norm_eps": 1e-5}},
        {"rms_norm_eps": 1e-3},
        {"norm_eps": 1e-3},
    ),
    "scaling-dropped": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": None},
        {"rope_scaling": None},
    ),
}


@pytest.mark.parametrize("by_like", [False, True], ids=["side-file", "like"])
@pytest.mark.parametrize("name", CHANGED)
def test_what_the_checkpoint_computes_decides(name: str, by_like: bool, tmp_path: Path) -> None:
    family, changes, edits, expected = CHANGED[name]
    source = make(family, **changes).save(tmp_path / "hf")
    options: dict[str, Any] = {"target": "nanotron-fast"} if "scaling" in name else {}
    nf.convert(source, tmp_path / "there", **options)
    edit(tmp_path / "there" / "model_config.json", **edits)
    if by_like:
        (tmp_path / "there" / "nanotron_fast.json").unlink()
        options["like"] = source
    report = nf.convert(tmp_path / "there", tmp_path / "back", **options)
    assert report.plan.warnings
    found = spec_of(tmp_path / "back")
    assert {key: getattr(found, key) for key in expected} == expected
    family_option = {"family": family} if by_like else {}
    assert nf.verify(tmp_path / "there", tmp_path / "back", **family_option).equal


def test_experts_under_two_names(tmp_path: Path) -> None:
    source = make("qwen2_moe", num_hidden_layers=2).save(tmp_path / "hf")
    edit(source / "config.json", moe_topk=2)
    nf.convert(source, tmp_path / "there")
    moe(tmp_path / "there" / "model_config.json", top_k=3)
    nf.convert(tmp_path / "there", tmp_path / "back")
    config = read(tmp_path / "back" / "config.json")
    assert (config["num_experts_per_tok"], config["moe_topk"]) == (3, 3)


def test_layers_that_nanotron_does_not_have_are_refused(tmp_path: Path) -> None:
    source = make("smollm3").save(tmp_path / "hf")
    nf.convert(source, tmp_path / "there")
    edit(tmp_path / "there" / "model_config.json", no_rope_layer=4)
    message = r"no_rope_layers leaves rotary embeddings out of layers \[3\] of 6"
    refused(tmp_path / "there", tmp_path, UnsupportedModelError, message)


def test_more_experts_for_a_token_than_there_are(tmp_path: Path) -> None:
    source = make("qwen2_moe", num_hidden_layers=2).save(tmp_path / "hf")
    nf.convert(source, tmp_path / "there")
    edit(source / "config.json", num_experts_per_tok=5)
    message = "config.json: num_experts_per_tok is 5, and num_experts is 4"
    refused(source, tmp_path, ConfigError, message)
    moe(tmp_path / "there" / "model_config.json", top_k=5)
    message = "moe_config: top_k is 5, and num_experts is 4"
    refused(tmp_path / "there", tmp_path, ConfigError, message)
