"""What some config.json files say of rotary embeddings beyond their base and their scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.families.quirk import Quirk, set_attention
from nanotron_fast.formats.fields import Fields, is_number
from nanotron_fast.formats.rope import must_agree, read_partial_rotary, read_rope
from nanotron_fast.model.spec import ModelSpec

_FACTOR = "partial_rotary_factor"
_ORIGINAL = "original_max_position_embeddings"
_LONGROPE = "longrope"


def rope_of_a_part(fields: Fields) -> tuple[float, Mapping[str, Any] | None]:
    """The base and the scaling where a part of each head may turn; see `read_rope`."""
    return read_rope(fields, may_be_partial=True)


@dataclass(frozen=True, slots=True)
class PartialRotary(Quirk):
    """`partial_rotary_factor`: the first rows of each head turn, that share of them.

    A family with it has `rope=rope_of_a_part`.
    """

    keys: frozenset[str] = frozenset({_FACTOR})
    expresses: frozenset[str] = frozenset({"partial_rotary"})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Gives layers the rows that turn. Raises ConfigError."""
        factor = read_partial_rotary(reader)
        head_dim = fields["layers"][0].attention.head_dim
        # As transformers rounds it.
        rows = int(head_dim * factor)
        if rows < 2 or rows % 2:
            raise ConfigError(
                f"config.json: {_FACTOR} {factor:g} turns {rows} of a head's {head_dim} rows, and "
                "that should be an even number of them"
            )
        set_attention(fields, rotary=(0, rows))

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds its key. Raises UnsupportedModelError where layers turn other rows."""
        attention = spec.attention
        if attention.rotary is None or attention.rotary[0] != 0:
            raise UnsupportedModelError(
                f"the rotary embedding turns rows {attention.rotary} of a head, and "
                f"{_FACTOR} can only say how many of the first rows it turns"
            )
        rows = attention.rotary[1]
        factor = rows / attention.head_dim
        if int(attention.head_dim * factor) < rows:
            factor = math.nextafter(factor, 1.0)
        config[_FACTOR] = factor


@dataclass(frozen=True, slots=True)
class LongRope(Quirk):
    """LongRoPE is the only scaling, and its first context a key beside it.

    A spec has that among the other values of the scaling.
    """

    keys: frozenset[str] = frozenset({_ORIGINAL})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Puts the first context into the scaling. Raises ConfigError."""
        scaling = fields["rope_scaling"]
        if scaling is None:
            return
        kind = scaling.get("rope_type") or scaling.get("type")
        # "su" and "yarn" are what the first of these models called it.
        if kind not in (_LONGROPE, "su", "yarn"):
            raise ConfigError(
                f"config.json: rope_scaling is of type {kind!r}, and should be {_LONGROPE!r}"
            )
        original = reader.positive(_ORIGINAL)
        if scaling.get(_ORIGINAL) is not None:
            places = {_ORIGINAL: original, f"rope_scaling.{_ORIGINAL}": scaling[_ORIGINAL]}
            must_agree("config.json", "the first context length", places)
        half = fields["layers"][0].attention.rotary[1] // 2
        for key in ("short_factor", "long_factor"):
            _check_factors(key, scaling.get(key), half)
        names = {key: _LONGROPE for key in ("rope_type", "type") if scaling.get(key) is not None}
        fields["rope_scaling"] = {**scaling, **names, _ORIGINAL: original}

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Takes the first context out of the scaling. Raises UnsupportedModelError."""
        if spec.rope_scaling is None:
            return
        scaling = dict(spec.rope_scaling)
        kind = scaling.get("rope_type") or scaling.get("type")
        if kind not in (_LONGROPE, "su"):
            raise UnsupportedModelError(
                f"rope_scaling of type {kind!r}: a {config['model_type']} has {_LONGROPE!r} alone"
            )
        config[_ORIGINAL] = scaling.pop(_ORIGINAL, spec.max_position_embeddings)
        # transformers 4 admits its type and the two lists of factors, and nothing else.
        config["rope_scaling"] = scaling


def _check_factors(key: str, factors: object, count: int) -> None:
    if not isinstance(factors, list) or not all(is_number(each) and each > 0 for each in factors):
        raise ConfigError(
            f"config.json: rope_scaling.{key} is {factors!r}, and should be a list of numbers"
        )
    if len(factors) != count:
        raise ConfigError(
            f"config.json: rope_scaling.{key} has {len(factors)} numbers, and the rotary embedding "
            f"has {count} frequencies"
        )
