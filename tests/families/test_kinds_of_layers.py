"""Layers with and without a window, whose rotary embeddings differ: what config.json says."""

from __future__ import annotations

from typing import Any

import pytest

from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.families import family_named, family_of_spec
from nanotron_fast.families.hf_config import read_config, write_config
from nanotron_fast.moves.dtypes import Dtype
from tests.families.zoo import SIZES, YARN

PLAIN = {"rope_type": "default", "rope_theta": 500000.0}
BOTH = {"full_attention": PLAIN, "sliding_attention": PLAIN}
WINDOWS = {"sliding_window": 8}
LINEAR = {"rope_type": "linear", "factor": 2.0}
KINDS = ["sliding_attention", "full_attention"] * 2


def read(family: str, **changes: Any) -> Any:
    return read_config(family_named(family), {**SIZES, "model_type": family, **changes})


@pytest.mark.parametrize(
    ("said", "theta", "scaling", "window_theta"),
    [
        ({"rope_theta": 500000.0}, 500000.0, None, None),
        ({"rope_theta": 500000.0, "rope_scaling": LINEAR}, 500000.0, LINEAR, 500000.0),
        ({"rope_parameters": BOTH}, 500000.0, None, None),
        ({"rope_parameters": BOTH, "rope_theta": 500000.0}, 500000.0, None, None),
        (
            {"rope_parameters": {**BOTH, "full_attention": {**LINEAR, "rope_theta": 1e6}}},
            *(1e6, LINEAR, 500000.0),
        ),
        (
            {"rope_parameters": {kind: {**LINEAR, "rope_theta": 1e6} for kind in BOTH}},
            *(1e6, LINEAR, None),
        ),
        (
            {"rope_parameters": {**BOTH, "sliding_attention": {**PLAIN, "rope_theta": 1e4}}},
            *(500000.0, None, 1e4),
        ),
    ],
)
def test_bases_and_scalings(
    said: dict[str, Any], theta: float, scaling: object, window_theta: float | None
) -> None:
    spec = read("olmo3", **WINDOWS, **said)
    assert (spec.rope_theta, spec.rope_scaling) == (theta, scaling)
    assert [each.attention.rope_theta for each in spec.layers] == [window_theta] * 3 + [None]
    assert spec.windows == (8, 8, 8, None)
    # What is written reads as the same, in transformers 4 too where it can say it.
    config = write_config(family_named("olmo3"), spec, Dtype.F32)
    assert read("olmo3", **config) == spec
    assert (config["rope_theta"], config["rope_scaling"]) == (theta, scaling)


@pytest.mark.parametrize(
    ("family", "said", "error", "message"),
    [
        ("olmo3", {}, ConfigError, "rope_theta is absent, and its default is an"),
        ("olmo3", {"rope_theta": 1e4}, ConfigError, "rope_theta is 10000.0, and transformers 5"),
        ("olmo3", {"rope_parameters": PLAIN}, ConfigError, "should have full_attention and slid"),
        (
            "olmo3",
            {"rope_parameters": {"full_attention": PLAIN}},
            ConfigError,
            "should have full_attention and sliding_attention",
        ),
        (
            "olmo3",
            {"rope_parameters": BOTH, "rope_theta": 1e6},
            ConfigError,
            "1000000.0 in rope_theta and 500000.0 in rope_parameters.rope_theta",
        ),
        (
            "olmo3",
            {"rope_parameters": {**BOTH, "sliding_attention": YARN}},
            UnsupportedModelError,
            "rope_parameters of layers with a window are scaled",
        ),
        (
            "qwen3_moe",
            {"use_sliding_window": True, "layer_types": KINDS},
            ConfigError,
            "2 of 4 layers a sliding window, and use_sliding_window True gives 4 of 4",
        ),
        ("exaone4", {"sliding_window_pattern": "LLLG"}, ConfigError, "pattern is 'LLLG', and"),
        (
            "exaone4",
            {"sliding_window": None, "layer_types": KINDS},
            ConfigError,
            "layer_types gives 2 of 4 layers a sliding window, and sliding_window is null",
        ),
    ],
)
def test_what_makes_no_sense(
    family: str, said: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read(family, **{**WINDOWS, **said})


@pytest.mark.parametrize(
    ("said", "windows", "no_rope_layers"),
    [
        ({}, (8, 8, 8, None), (3,)),
        ({"sliding_window_pattern": 2}, (8, None, 8, None), (1, 3)),
        ({"layer_types": KINDS, "sliding_window_pattern": "LG"}, (8, None, 8, None), (1, 3)),
        ({"layer_types": ["sliding_attention"] * 4}, (8,) * 4, ()),
        ({"layer_types": ["full_attention"] * 4}, (None,) * 4, (0, 1, 2, 3)),
        ({"sliding_window": None}, (None,) * 4, ()),
    ],
)
def test_windows_or_no_rotary_embedding(
    said: dict[str, Any], windows: tuple[int | None, ...], no_rope_layers: tuple[int, ...]
) -> None:
    spec = read("exaone4", **{**WINDOWS, **said})
    assert (spec.windows, spec.no_rope_layers) == (windows, no_rope_layers)
    config = write_config(family_named("exaone4"), spec, Dtype.F32)
    assert read("exaone4", **config) == spec


@pytest.mark.parametrize(
    ("family", "said"),
    [("olmo3", {"rope_parameters": BOTH}), ("exaone4", {}), ("exaone4", {"sliding_window": None})],
)
def test_the_family_of_a_spec_is_found(family: str, said: dict[str, Any]) -> None:
    assert family_of_spec(read(family, **{**WINDOWS, **said})).name == family


GEMMA3 = {"full_attention": {**LINEAR, "rope_theta": 1e6}, "sliding_attention": PLAIN}
LOCAL = {"rope_theta": 1e6, "rope_scaling": LINEAR, "rope_local_base_freq": 500000.0}


@pytest.mark.parametrize(
    ("said", "theta", "scaling", "window_theta"),
    [
        ({}, 1e6, None, 1e4),
        (LOCAL, 1e6, LINEAR, 5e5),
        ({"rope_parameters": GEMMA3}, 1e6, LINEAR, 5e5),
        ({"rope_parameters": GEMMA3, **LOCAL}, 1e6, LINEAR, 5e5),
        ({"rope_theta": 1e4}, 1e4, None, None),
    ],
)
def test_a_base_of_layers_with_a_window(
    said: dict[str, Any], theta: float, scaling: Any, window_theta: float | None
) -> None:
    spec = read("gemma3_text", **{**WINDOWS, "sliding_window_pattern": 2, **said})
    assert (spec.rope_theta, spec.rope_scaling) == (theta, scaling)
    assert [each.attention.rope_theta for each in spec.layers] == [window_theta, None] * 2
    config = write_config(family_named("gemma3_text"), spec, Dtype.F32)
    assert config["rope_local_base_freq"] == (window_theta or theta)
    assert read("gemma3_text", **config) == spec
    assert family_of_spec(spec).name == "gemma3_text"
    # Every version of transformers reads the same of what is written.
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Gemma3TextConfig(**config)
    by_kind = getattr(theirs, "rope_parameters", None)
    if by_kind is None:  # version 4
        bases, kind = (theirs.rope_theta, theirs.rope_local_base_freq), theirs.rope_scaling
    else:
        full, sliding = by_kind["full_attention"], by_kind["sliding_attention"]
        bases = full["rope_theta"], sliding["rope_theta"]
        kind = None if full["rope_type"] == "default" else full
    assert bases == (theta, window_theta or theta)
    assert (kind or {}).get("rope_type") == (scaling or {}).get("rope_type")


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        ({"rope_local_base_freq": 0}, ConfigError, "rope_local_base_freq is 0, .* positive"),
        ({"rope_local_base_freq": None}, ConfigError, "rope_local_base_freq is None, .* a number"),
        (
            {"rope_parameters": GEMMA3, "rope_local_base_freq": 100.0},
            ConfigError,
            "100.0 in rope_local_base_freq and 500000.0 in rope_parameters.sliding",
        ),
        ({"rope_parameters": PLAIN}, ConfigError, "should have full_attention and sliding_attent"),
        (
            {"rope_parameters": {**GEMMA3, "sliding_attention": YARN}},
            UnsupportedModelError,
            "rope_parameters of layers with a window are scaled",
        ),
    ],
)
def test_a_base_of_layers_with_a_window_that_makes_no_sense(
    said: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read("gemma3_text", **{**WINDOWS, **said})
