"""The part `model.model_config`: one of Nanotron's model classes, read strictly and filled in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.formats.nanotron.classes import (
    MOE_FIELDS,
    NanotronClass,
    classes,
)
from nanotron_fast.formats.nanotron.classes.base import FILE
from nanotron_fast.model.spec import ModelSpec
from nanotron_fast.train.config.place import Place
from nanotron_fast.train.config.schema import unknown_key

# Of Nanotron's MoEConfig, in its order.
_MOE_DEFAULTS: dict[str, Any] = {
    "num_experts": 8,
    "top_k": 2,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "router_aux_loss_coef": 0.01,
    "layers": [-1],
    "enable_shared_expert": False,
    "token_dispatcher_type": "alltoall",
}
assert tuple(_MOE_DEFAULTS) == MOE_FIELDS


def class_named(config: Mapping[str, Any], place: Place) -> NanotronClass:
    """The class that a mapping is of, as Nanotron finds it. Raises ConfigError.

    A marker says it; without one it is the first class that knows every key.
    """
    for each in classes():
        if config.get(each.marker):
            return each
    for each in classes():
        if set(config) <= set(each.fields):
            return each
    markers = " or ".join(each.marker for each in classes())
    raise place.error(f" is of no class of Nanotron's: write {markers}: true into it")


def complete(config: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Every field, in Nanotron's order, as Nanotron itself fills them in. Raises ConfigError."""
    model_class = class_named(config, place)
    known = tuple(model_class.fields)
    for key in config:
        if key not in known:
            raise place.at(key).error(unknown_key(key, known))
    full = {**model_class.fields, **config, model_class.marker: True}
    full = {key: full[key] for key in known}
    if full.get("num_key_value_heads", 0) is None:
        full["num_key_value_heads"] = full["num_attention_heads"]
    if full.get("moe_config") is not None:
        full["moe_config"] = _complete_moe(full, place.at("moe_config"))
    try:
        model_class.read(full)
    except (ConfigError, UnsupportedModelError) as error:
        raise type(error)(_said_here(str(error), place)) from None
    return full


def spec_of(complete: Mapping[str, Any], place: Place) -> ModelSpec:
    """The architecture that a mapping with every field is of. Raises ConfigError."""
    return class_named(complete, place).read(complete)


def _said_here(message: str, place: Place) -> str:
    """What was said of a model_config.json, of this place."""
    if not message.startswith(f"{FILE}: "):
        return f"{place}: {message}"
    what = message.removeprefix(f"{FILE}: ").replace("moe_config: ", "moe_config.")
    key, _, rest = what.partition(" ")
    return f"{place.at(key)} {rest}"


def _complete_moe(full: Mapping[str, Any], place: Place) -> dict[str, Any]:
    given = full["moe_config"]
    if not isinstance(given, Mapping):
        raise place.wrong(given, f"a mapping with {', '.join(MOE_FIELDS)}, or null")
    for key in given:
        if key not in MOE_FIELDS:
            raise place.at(key).error(unknown_key(key, MOE_FIELDS))
    moe = {**_MOE_DEFAULTS, **given}
    num_layers = full["num_hidden_layers"]
    if moe["layers"] == [-1] and isinstance(num_layers, int):
        moe["layers"] = list(range(num_layers))
    return moe
