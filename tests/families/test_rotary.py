"""What config.json says of rotary embeddings that turn a part of a head, or are LongRoPE."""

from __future__ import annotations

from typing import Any

import pytest

from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.families import family_named
from nanotron_fast.families.hf_config import read_config, write_config
from nanotron_fast.model.spec import ModelSpec
from nanotron_fast.moves.dtypes import Dtype
from tests.families.zoo import LONGROPE, SIZES

HEADS_OF_8 = {**SIZES, "hidden_size": 64, "model_type": "phi3"}
LONG = {"rope_scaling": LONGROPE, "partial_rotary_factor": 0.75}


def read(**changes: Any) -> ModelSpec:
    return read_config(family_named("phi3"), {**HEADS_OF_8, **changes})


@pytest.mark.parametrize(
    ("said", "end"),
    [
        ({}, 8),
        ({"partial_rotary_factor": 0.5}, 4),
        ({"partial_rotary_factor": 0.3}, 2),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, 4),
        ({"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.5}}, 4),
        ({"hidden_size": 8 * 98, "partial_rotary_factor": 94 / 98}, 94),
    ],
)
def test_the_rows_that_turn(said: dict[str, Any], end: int) -> None:
    spec = read(**said)
    assert {each.attention.rotary for each in spec.layers} == {(0, end)}
    config = write_config(family_named("phi3"), spec, Dtype.BF16)
    assert read_config(family_named("phi3"), config) == spec


def test_every_number_of_rows_can_be_written() -> None:
    """A share is a quotient, and what it gives back is rounded down."""
    for head_dim in range(2, 130, 2):
        sizes = {"hidden_size": 8 * head_dim, "partial_rotary_factor": 1.0}
        spec = read(**sizes)
        for end in range(2, head_dim + 1, 2):
            partial = spec.with_attention(rotary=(0, end))
            config = write_config(family_named("phi3"), partial, Dtype.BF16)
            assert int(head_dim * config["partial_rotary_factor"]) == end


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"partial_rotary_factor": 0.4}, "0.4 turns 3 of a head's 8 rows"),
        ({"partial_rotary_factor": 0.1}, "0.1 turns 0 of a head's 8 rows"),
        ({"partial_rotary_factor": 1.5}, "1.5, and should be above 0 and at most 1"),
        ({"partial_rotary_factor": None}, "None, and should be above 0"),
        ({"partial_rotary_factor": "half"}, "'half', and should be above 0"),
        (
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 1.0}},
            r"0.5 in partial_rotary_factor and 1.0 in rope_parameters.partial_rotary_factor",
        ),
        (
            {"rope_scaling": {**LONGROPE, "partial_rotary_factor": 0.75}},
            r"1.0 in partial_rotary_factor, which is absent \(1.0 in transformers 4\) and 0.75",
        ),
        ({**LONG, "rope_scaling": {"type": "linear", "factor": 2.0}}, "of type 'linear'"),
        ({"rope_scaling": LONGROPE}, "short_factor has 3 numbers, .* has 4 frequencies"),
        ({**LONG, "rope_scaling": {**LONGROPE, "long_factor": [1.0]}}, "long_factor has 1 numbers"),
        ({**LONG, "rope_scaling": {**LONGROPE, "long_factor": "x"}}, "should be a list of numbers"),
        ({**LONG, "original_max_position_embeddings": 0}, "should be at least 1"),
        (
            {**LONG, "rope_scaling": {**LONGROPE, "original_max_position_embeddings": 16}},
            "first context length is 4096 .* and 16 in rope_scaling",
        ),
    ],
)
def test_what_makes_no_sense(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**said)


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_the_first_context_is_part_of_the_scaling(kind: str) -> None:
    """As transformers, which takes all three for LongRoPE."""
    scaling = {**LONGROPE, "type": kind}
    spec = read(
        rope_scaling=scaling, partial_rotary_factor=0.75, original_max_position_embeddings=16
    )
    assert spec.rope_scaling == {**LONGROPE, "original_max_position_embeddings": 16}
    config = write_config(family_named("phi3"), spec, Dtype.BF16)
    # transformers 4 refuses more than these three.
    assert config["rope_scaling"] == LONGROPE
    assert config["original_max_position_embeddings"] == 16
    assert read_config(family_named("phi3"), config) == spec


def test_what_a_config_cannot_say() -> None:
    spec = read()
    for changes, message in (
        ({"rotary": None}, "turns rows None"),
        ({"rotary": (2, 8)}, r"turns rows \(2, 8\)"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            write_config(family_named("phi3"), spec.with_attention(**changes), Dtype.BF16)
