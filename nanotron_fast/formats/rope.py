"""What a configuration says of its rotary embedding, which several keys may hold.

transformers 4 reads `rope_theta` and `rope_scaling`, version 5 `rope_parameters` first, and takes
a `rope_scaling` for it. Where they hold different values, a model would compute one thing in one
version and another in the next, so that is refused; equal values agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.formats.fields import Fields, is_number

_DICTS = ("rope_parameters", "rope_scaling")
# Kept apart from a scaling: they are fields of their own, or another name for one.
_PARTIAL = "partial_rotary_factor"
_NOT_SCALING = ("rope_theta", _PARTIAL, "type")


def must_agree(file: str, what: str, places: Mapping[str, Any]) -> None:
    """Refuses one thing that has different values in two places. Raises ConfigError."""
    (first, value), *others = places.items()
    for place, other in others:
        if other != value:
            raise ConfigError(
                f"{file}: {what} is {value!r} in {first} and {other!r} in {place}: which one a "
                "model gets depends on the version that reads it; leave one out, or make them equal"
            )


def read_rope(
    fields: Fields, *, may_be_partial: bool = False
) -> tuple[float, Mapping[str, Any] | None]:
    """The base of the angles, and how they are scaled (None: not at all).

    With `may_be_partial` a part of each head may turn, see `read_partial_rotary`.

    Raises ConfigError, UnsupportedModelError.
    """
    dicts = {key: value for key in _DICTS if (value := _dict(fields, key))}
    theta = _theta(fields, dicts)
    if not may_be_partial:
        _check_partial_rotary(fields, dicts)
    scalings = {key: _scaling(fields, key, value) for key, value in dicts.items()}
    if not scalings:
        return theta, None
    must_agree(fields.file, "the scaling of rotary embeddings", scalings)
    scaling = next(iter(scalings.values()))
    return theta, None if scaling["rope_type"] == "default" else _as_written(dicts)


def read_partial_rotary(fields: Fields) -> float:
    """The share of each head's rows that turns, above 0 and at most 1. Raises ConfigError."""
    dicts = {key: value for key in _DICTS if (value := _dict(fields, key))}
    places = _places(fields, dicts, _PARTIAL)
    for place, factor in places.items():
        if not is_number(factor) or not 0 < factor <= 1:
            raise ConfigError(
                f"{fields.file}: {place} is {factor!r}, and should be above 0 and at most 1"
            )
    must_agree(fields.file, "the share of a head that turns", places)
    return float(next(iter(places.values())))


def _dict(fields: Fields, key: str) -> Mapping[str, Any] | None:
    value = fields.mapping(key)
    if value is not None and any(isinstance(item, Mapping) for item in value.values()):
        raise UnsupportedModelError(
            f"{fields.file}: {key} differ between kinds of layers, and Nanotron has one rotary "
            "embedding for all of them"
        )
    return value


def _places(fields: Fields, dicts: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The values of one field, by the places that have it; else its default."""
    places = {
        f"{key}.{name}": value[name] for key, value in dicts.items() if value.get(name) is not None
    }
    if fields.config.get(name) is not None:
        return {name: fields.config[name], **places}
    if f"rope_scaling.{name}" in places and "rope_parameters" not in dicts:
        # Version 4 does not look into rope_scaling for it.
        absent = f"{name}, which is absent ({fields.get(name)!r} in transformers 4)"
        return {absent: fields.get(name), **places}
    return places or {name: fields.get(name)}


def _theta(fields: Fields, dicts: Mapping[str, Mapping[str, Any]]) -> float:
    places = _places(fields, dicts, "rope_theta")
    for place, theta in places.items():
        if not is_number(theta) or theta <= 0:
            raise ConfigError(
                f"{fields.file}: {place} is {theta!r}, and should be a positive number"
            )
    must_agree(fields.file, "the base of rotary embeddings", places)
    return float(next(iter(places.values())))


def _check_partial_rotary(fields: Fields, dicts: Mapping[str, Mapping[str, Any]]) -> None:
    places = {"": fields.config, **dicts}
    for place, values in places.items():
        factor = values.get(_PARTIAL)
        if factor is not None and factor != 1.0:
            name = f"{place}.{_PARTIAL}" if place else _PARTIAL
            raise UnsupportedModelError(
                f"{fields.file}: {name} is {factor!r}: Nanotron rotates whole heads only"
            )


def _scaling(fields: Fields, key: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """A scaling under its names of today, to be compared."""
    names = {
        f"{key}.{name}": value[name]
        for name in ("rope_type", "type")
        if value.get(name) is not None
    }
    if names:
        must_agree(fields.file, "the kind of scaling", names)
    kind = next(iter(names.values()), "default")
    rest = {name: item for name, item in value.items() if name not in _NOT_SCALING}
    return {**rest, "rope_type": kind}


def _as_written(dicts: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The scaling by the names that the file has it under, without what is a field of its own."""
    value = dicts.get("rope_scaling") or dicts["rope_parameters"]
    return {name: item for name, item in value.items() if name not in ("rope_theta", _PARTIAL)}
