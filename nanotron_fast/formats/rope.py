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
_NOT_SCALING = ("rope_theta", "partial_rotary_factor", "type")


def must_agree(file: str, what: str, places: Mapping[str, Any]) -> None:
    """Refuses one thing that has different values in two places. Raises ConfigError."""
    (first, value), *others = places.items()
    for place, other in others:
        if other != value:
            raise ConfigError(
                f"{file}: {what} is {value!r} in {first} and {other!r} in {place}: which one a "
                "model gets depends on the version that reads it; leave one out, or make them equal"
            )


def read_rope(fields: Fields) -> tuple[float, Mapping[str, Any] | None]:
    """The base of the angles, and how they are scaled (None: not at all).

    Raises ConfigError, UnsupportedModelError.
    """
    dicts = {key: value for key in _DICTS if (value := _dict(fields, key))}
    theta = _theta(fields, dicts)
    _check_partial_rotary(fields, dicts)
    scalings = {key: _scaling(fields, key, value) for key, value in dicts.items()}
    if not scalings:
        return theta, None
    must_agree(fields.file, "the scaling of rotary embeddings", scalings)
    scaling = next(iter(scalings.values()))
    return theta, None if scaling["rope_type"] == "default" else _as_written(dicts)


def _dict(fields: Fields, key: str) -> Mapping[str, Any] | None:
    value = fields.mapping(key)
    if value is not None and any(isinstance(item, Mapping) for item in value.values()):
        raise UnsupportedModelError(
            f"{fields.file}: {key} differ between kinds of layers, and Nanotron has one rotary "
            "embedding for all of them"
        )
    return value


def _theta(fields: Fields, dicts: Mapping[str, Mapping[str, Any]]) -> float:
    places = {
        f"{key}.rope_theta": value["rope_theta"]
        for key, value in dicts.items()
        if value.get("rope_theta") is not None
    }
    if fields.config.get("rope_theta") is not None:
        places = {"rope_theta": fields.config["rope_theta"], **places}
    elif "rope_scaling.rope_theta" in places and "rope_parameters" not in dicts:
        # Version 4 does not look into rope_scaling for it.
        absent = f"rope_theta, which is absent ({fields.get('rope_theta')!r} in transformers 4)"
        places = {absent: fields.get("rope_theta"), **places}
    if not places:
        places = {"rope_theta": fields.get("rope_theta")}
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
        factor = values.get("partial_rotary_factor")
        if factor is not None and factor != 1.0:
            name = f"{place}.partial_rotary_factor" if place else "partial_rotary_factor"
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
    return {
        name: item
        for name, item in value.items()
        if name not in ("rope_theta", "partial_rotary_factor")
    }
