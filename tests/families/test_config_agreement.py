"""Two fields of a configuration that hold the same thing: alike, or refused with both values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast as nf
from nanotron_fast.errors import ConfigError
from tests.modelzoo import make
from tests.refusals import refused

T5 = {"rope_type": "default", "rope_theta": 500000.0}
LINEAR = {"rope_type": "linear", "factor": 2.0}
ALL, NONE = ["sliding_attention"] * 2, ["full_attention"] * 2
WINDOW = {"use_sliding_window": True, "sliding_window": 8}

# Family, changes to its config (... leaves a key out), words of the refusal.
DIFFERENT: dict[str, tuple[str, dict[str, Any], str]] = {
    "theta-in-scaling-alone": (
        "llama",
        {"rope_theta": ..., "rope_scaling": T5},
        r"is 10000.0 in rope_theta, which is absent .* and 500000.0 in rope_scaling.rope_theta",
    ),
    "theta-and-parameters": (
        "llama",
        {"rope_parameters": T5},
        r"10000.0 in rope_theta and 500000.0 in rope_parameters.rope_theta",
    ),
    "theta-and-scaling": (
        "qwen2",
        {"rope_theta": 1e6, "rope_scaling": T5},
        r"1000000.0 in rope_theta and 500000.0 in rope_scaling.rope_theta",
    ),
    "theta-in-both-objects": (
        "llama",
        {"rope_theta": ..., "rope_parameters": T5, "rope_scaling": {**T5, "rope_theta": 1e4}},
        r"500000.0 in rope_parameters.rope_theta and 10000.0 in rope_scaling.rope_theta",
    ),
    "scalings": (
        "llama",
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        r"the scaling .* 'default'.* in rope_parameters and .*'linear'.* in rope_scaling",
    ),
    "scaling-factors": (
        "llama",
        {"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "factor": 4.0}},
        r"'factor': 4.0.* in rope_parameters and .*'factor': 2.0.* in rope_scaling",
    ),
    "kinds-of-scaling": (
        "llama",
        {"rope_scaling": {"type": "dynamic", **LINEAR}},
        r"'linear' in rope_scaling.rope_type and 'dynamic' in rope_scaling.type",
    ),
    "dtypes": (
        "llama",
        {"dtype": "float16", "torch_dtype": "bfloat16"},
        "the dtype is 'float16' in dtype and 'bfloat16' in torch_dtype",
    ),
    "experts": (
        "qwen2_moe",
        {"num_local_experts": 8},
        "num_experts is 4 in num_experts and 8 in num_local_experts",
    ),
    "window-of-no-layer": (
        "mistral",
        {"sliding_window": 8, "layer_types": NONE},
        "'full_attention' for every layer, and sliding_window 8 gives 2 of 2 layers",
    ),
    "layers-without-a-window": (
        "mistral",
        {"sliding_window": None, "layer_types": ALL},
        "layer_types gives 2 of 2 layers a sliding window, and sliding_window is null",
    ),
    "layers-of-a-llama": ("llama", {"layer_types": ALL}, "and a llama has none"),
    "window-not-in-use": ("qwen2", {"layer_types": ALL}, "and use_sliding_window is false"),
    "older-field": (
        "qwen2",
        {**WINDOW, "max_window_layers": 0, "layer_types": NONE},
        "'full_attention' for every layer, and max_window_layers 0 gives 2 of 2",
    ),
    "older-field-the-other-way": (
        "qwen2",
        {**WINDOW, "max_window_layers": 1, "layer_types": ALL},
        "'sliding_attention' for every layer, and max_window_layers 1 gives 1 of 2",
    ),
    "inner-config": (
        "llama",
        {"text_config": {"rms_norm_eps": 1e-3}},
        "rms_norm_eps is 1e-05 in rms_norm_eps and 0.001 in text_config.rms_norm_eps",
    ),
}
# What says the same thing twice: family, changes, fields of the spec that must come out.
ALIKE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "theta-thrice": (
        "llama",
        {"rope_theta": 5e5, "rope_parameters": T5, "rope_scaling": T5},
        {"rope_theta": 5e5, "rope_scaling": None},
    ),
    "theta-in-scaling-is-the-default": (
        "llama",
        {"rope_theta": ..., "rope_scaling": {**T5, "rope_theta": 1e4}},
        {"rope_theta": 1e4, "rope_scaling": None},
    ),
    "parameters-alone": ("llama", {"rope_theta": ..., "rope_parameters": T5}, {"rope_theta": 5e5}),
    "dtypes": ("llama", {"dtype": "torch.bfloat16", "torch_dtype": "bfloat16"}, {}),
    "experts": ("qwen2_moe", {"num_local_experts": 4, "num_hidden_layers": 1}, {}),
    "window": ("mistral", {"sliding_window": 8, "layer_types": ALL}, {"sliding_window": 8}),
    "no-window": ("mistral", {"layer_types": NONE}, {"sliding_window": None}),
    "qwen": (
        "qwen2",
        {**WINDOW, "max_window_layers": 0, "layer_types": ALL},
        {"sliding_window": 8},
    ),
    "inner-config": ("llama", {"text_config": {"rms_norm_eps": 1e-5}}, {"norm_eps": 1e-5}),
}


def saved(root: Path, family: str, changes: dict[str, Any]) -> Path:
    own = {key: value for key, value in changes.items() if key != "dtype"}
    model = make(family, **{"num_hidden_layers": 2, **own})
    model.config.update({key: changes[key] for key in changes if key == "dtype"})
    return model.save(root)


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_values_are_refused(name: str, tmp_path: Path) -> None:
    family, changes, message = DIFFERENT[name]
    refused(saved(tmp_path / "hf", family, changes), tmp_path, ConfigError, message)


@pytest.mark.parametrize("name", ALIKE)
def test_equal_values_agree_quietly(name: str, tmp_path: Path) -> None:
    family, changes, expected = ALIKE[name]
    plan = nf.plan(saved(tmp_path / "hf", family, changes), tmp_path / "out")
    assert plan.warnings == ()
    assert {key: getattr(plan.spec, key) for key in expected} == expected


def test_a_nanotron_config_with_two_thetas(tmp_path: Path) -> None:
    nf.convert(saved(tmp_path / "hf", "llama", {}), tmp_path / "there")
    (tmp_path / "there" / "nanotron_fast.json").unlink()
    path = tmp_path / "there" / "model_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_scaling": T5}))
    message = r"model_config.json: .* 10000.0 in rope_theta and 500000.0 in rope_scaling"
    refused(tmp_path / "there", tmp_path, ConfigError, message)
