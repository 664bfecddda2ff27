"""Rotary embeddings of two kinds: of layers with a window, and of those without.

The model's own base and scaling are those of the layers without a window. A layer with one has
another base, or none of the scaling, in `Attention.rope_theta`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.families.quirk import OneKey, Quirk
from nanotron_fast.formats.fields import Fields
from nanotron_fast.formats.rope import must_agree, read_rope
from nanotron_fast.model.spec import Layer, ModelSpec

_FULL, _SLIDING = "full_attention", "sliding_attention"
_KEY = "rope_parameters"
_Rope = tuple[float, Mapping[str, Any] | None]


def full_rope(fields: Fields) -> _Rope:
    """The base and the scaling of layers without a window; see `read_rope`."""
    kinds = _kinds(fields)
    return read_rope(fields) if kinds is None else read_rope(_of_kind(fields, kinds, _FULL))


def _kinds(fields: Fields) -> Mapping[str, Any] | None:
    """`rope_parameters`, where it is there. Raises ConfigError where it is not by kind of layer."""
    kinds = fields.mapping(_KEY)
    if kinds is None:
        return None
    if any(not isinstance(kinds.get(kind), Mapping) for kind in (_FULL, _SLIDING)):
        raise ConfigError(
            f"{fields.file}: {_KEY} is {dict(kinds)!r}, and should have {_FULL} and {_SLIDING}, "
            "each with a rope_type and a rope_theta"
        )
    return kinds


def _of_kind(fields: Fields, kinds: Mapping[str, Any], kind: str) -> Fields:
    """The config as one kind of layers has it: rope_scaling and rope_theta are the full ones'."""
    others = (_KEY,) if kind == _FULL else (_KEY, "rope_theta", "rope_scaling")
    config = {key: value for key, value in fields.config.items() if key not in others}
    return Fields(fields.file, {**config, _KEY: kinds[kind]}, fields.defaults)


def _give(fields: dict[str, Any], theta: float) -> None:
    """Gives layers with a window their base."""
    layers: list[Layer] = fields["layers"]
    fields["layers"] = [
        replace(each, attention=replace(each.attention, rope_theta=theta))
        if each.attention.window
        else each
        for each in layers
    ]


@dataclass(frozen=True, slots=True)
class UnscaledWindows(Quirk):
    """Layers with a window take no part in rope_scaling, and may have a base of their own.

    Args:
        assumed: the base that transformers 5 gives them where a config has none by kind of layer.

    Transformers 4 has one `rope_theta` for both kinds; 5 has `rope_parameters` for each, and takes
    a `rope_theta` for the layers without a window alone.
    """

    assumed: float
    expresses: frozenset[str] = frozenset({"some_rope_thetas"})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Gives layers with a window their base. Raises ConfigError, UnsupportedModelError."""
        layers: list[Layer] = fields["layers"]
        if _kinds(reader) is None and reader.config.get("rope_theta") is None:
            raise ConfigError(
                f"{reader.file}: rope_theta is absent, and its default is another in transformers "
                f"4 than in 5 ({reader.get('rope_theta')!r}): say which the model has"
            )
        if not any(each.attention.window for each in layers):
            return
        full: _Rope = (fields["rope_theta"], fields["rope_scaling"])
        theta, scaling = self._windowed(reader)
        if (theta, scaling) == full:
            return
        if scaling is not None:
            raise UnsupportedModelError(
                f"{reader.file}: {_KEY} of layers with a window are scaled, {dict(scaling)!r}, and "
                f"otherwise than those of the other layers, {full[1]!r}: one of them is none"
            )
        _give(fields, theta)

    def _windowed(self, reader: Fields) -> _Rope:
        """The base and the scaling of layers with a window."""
        kinds = _kinds(reader)
        if kinds is not None:
            return read_rope(_of_kind(reader, kinds, _SLIDING))
        stated = reader.config["rope_theta"]
        if stated != self.assumed:
            raise ConfigError(
                f"{reader.file}: rope_theta is {stated!r}, and transformers 5 would give layers "
                f"with a window {self.assumed!r}, which transformers 4 does not: say the bases of "
                f"both kinds of layers in {_KEY}"
            )
        return float(stated), None

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds both kinds where rope_theta and rope_scaling alone would be read otherwise."""
        windowed = [each.attention.rope_theta for each in spec.layers if each.attention.window]
        scaling = dict(spec.rope_scaling or {"rope_type": "default"})
        full = {**scaling, "rope_theta": spec.rope_theta}
        own = next(iter(windowed), None)
        sliding = full if own is None else {"rope_type": "default", "rope_theta": own}
        assumed = {"rope_type": "default", "rope_theta": self.assumed}
        if windowed and (sliding != assumed or spec.rope_theta != self.assumed):
            config[_KEY] = {_FULL: full, _SLIDING: dict(sliding)}


@dataclass(frozen=True, slots=True)
class LocalBase(OneKey):
    """Layers with a window have a base of their own, `rope_local_base_freq`, and no scaling.

    Transformers 4 and 5 both read it; 5 writes `rope_parameters` for each kind of layer instead.
    """

    key: str = "rope_local_base_freq"
    expresses: frozenset[str] = frozenset({"some_rope_thetas"})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Gives layers with a window their base. Raises ConfigError, UnsupportedModelError."""
        kinds, stated = _kinds(reader), reader.config.get(self.key)
        theta = reader.number(self.key) if kinds is None or stated is not None else None
        if theta is not None and theta <= 0:
            raise reader.error(self.key, "a positive number")
        if kinds is not None:
            own, scaling = read_rope(_of_kind(reader, kinds, _SLIDING))
            if scaling is not None:
                raise UnsupportedModelError(
                    f"{reader.file}: {_KEY} of layers with a window are scaled, {dict(scaling)!r}, "
                    "and no model of this package's scales them"
                )
            if theta is not None:
                places = {self.key: theta, f"{_KEY}.{_SLIDING}.rope_theta": own}
                must_agree(reader.file, "the base of layers with a window", places)
            theta = own
        if (theta, None) != (fields["rope_theta"], fields["rope_scaling"]):
            assert theta is not None
            _give(fields, theta)

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds the key."""
        own = (each.attention.rope_theta for each in spec.layers if each.attention.window)
        config[self.key] = next(own, None) or spec.rope_theta
