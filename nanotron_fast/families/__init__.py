"""The families of models, by the name that `config.json` has in `model_type`.

Each is the FAMILY of a file in this folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from nanotron_fast.errors import ConfigError, NanotronFastError, UnsupportedModelError
from nanotron_fast.families import foreign
from nanotron_fast.families.family import Family
from nanotron_fast.families.hf_config import read_config, write_config
from nanotron_fast.families.refusals import unknown_family
from nanotron_fast.formats.nanotron.classes import class_of
from nanotron_fast.model.spec import COMPUTED, ModelSpec
from nanotron_fast.moves.dtypes import Dtype

__all__ = [
    "Family",
    "family_named",
    "family_names",
    "family_of_config",
    "family_of_model_config",
    "family_of_spec",
    "register",
    "warnings_about",
]


def _built_in() -> Iterator[Family]:
    """The FAMILY of every file here that has one, in the order of the files' names."""
    for module in iter_modules(__path__):
        family = getattr(import_module(f"{__name__}.{module.name}"), "FAMILY", None)
        if family is not None:
            yield family


BUILT_IN = tuple(_built_in())
_FAMILIES: dict[str, Family] = {family.name: family for family in BUILT_IN}


def register(family: Family) -> None:
    """Adds a family to those that every function of this package knows. Raises ValueError."""
    if family.name in _FAMILIES and _FAMILIES[family.name] is not family:
        raise ValueError(f"a family named {family.name!r} is there already")
    _FAMILIES[family.name] = family


def family_names() -> list[str]:
    """Every family's name, in the order of registration."""
    return list(_FAMILIES)


def family_named(name: str) -> Family:
    """A family by its name. Raises ConfigError."""
    if name not in _FAMILIES:
        raise ConfigError(f"--family {name}: choose one of {', '.join(_FAMILIES)}")
    return _FAMILIES[name]


def family_of_config(config: Mapping[str, Any], override: str | None = None) -> Family:
    """The family of a Hugging Face config. Raises ConfigError, UnsupportedModelError.

    An override changes the table of tensors. It is refused where the config says that its model
    computes what that family does not.
    """
    if override is not None:
        return foreign.seen_as(family_named(override), config, _FAMILIES)
    model_type = config.get("model_type")
    if model_type is None:
        raise ConfigError("config.json: model_type is missing; name it with --family")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise unknown_family(model_type, family_names())
    return _FAMILIES[model_type]


def warnings_about(family: Family, config: Mapping[str, Any]) -> list[str]:
    """What to tell of a Hugging Face config that is read as one of a family."""
    return foreign.warnings_about(family, config, _FAMILIES)


def family_of_model_config(config: Mapping[str, Any], override: str | None = None) -> Family:
    """The family of a Nanotron model_config.json.

    A class holds several families; what the config says decides which, by what each family
    recognises, and the later ones are asked first. The old conversion script wrote a
    Qwen2Config for Llama, so one without anything of Qwen's is a llama.
    """
    model_class = class_of(config)
    named = None if model_class.is_stock else _named_by(config)
    if override is not None:
        family = family_named(override)
        if model_class.is_stock and model_class not in family.classes:
            raise UnsupportedModelError(
                f"--family {override}: model_config.json is a {model_class}, which does not hold it"
            )
        return family
    if named is not None:
        return named
    held = [family for family in reversed(_FAMILIES.values()) if model_class in family.classes]
    for family in held:
        if family.recognises(config):
            return family
    if len(held) != 1:
        raise ConfigError(
            f"model_config.json: a {model_class} holds {', '.join(each.name for each in held)}; "
            "name one of them with --family"
        )
    return held[0]


def family_of_spec(spec: ModelSpec) -> Family:
    """The first family whose config.json can say all that a spec computes, Nanotron's own before
    others. Raises UnsupportedModelError.
    """
    # Of no consequence for what is computed, and no configuration leaves it out.
    full = replace(spec, router_aux_loss_coef=spec.router_aux_loss_coef or 0.0)
    for family in sorted(_FAMILIES.values(), key=lambda each: not each.model_class.is_stock):
        try:
            said = read_config(family, write_config(family, full, Dtype.F32))
        except NanotronFastError:
            continue
        if all(getattr(said, name) == getattr(spec, name) for name in COMPUTED):
            return family
    raise UnsupportedModelError(
        "no family's config.json can say all that this spec computes; name the family whose table "
        "it goes by"
    )


def _named_by(config: Mapping[str, Any]) -> Family:
    """The family that a model_config.json names. Raises ConfigError."""
    name = config.get("family")
    if not isinstance(name, str) or name not in _FAMILIES:
        raise ConfigError(
            f"model_config.json: family is {name!r}, and should be one of {', '.join(_FAMILIES)}"
        )
    return _FAMILIES[name]
