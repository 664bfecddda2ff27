"""A family that is given by hand for a model of another type.

`--family` changes the table of tensors, never what the source's own configuration says that its
model computes: what the chosen family has no place for must be neutral.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.families.family import Family
from nanotron_fast.families.hf_config import read_config
from nanotron_fast.families.model_types import NEUTRAL, like_llama, refusal_of
from nanotron_fast.model.spec import ModelSpec, differing_layer

# What two families may read out of one config.json differently, and the key that says it.
_COMPUTED = {
    "sliding_window": "sliding_window",
    "windows": "layer_types",
    "no_rope_interval": "no_rope_layers",
    "no_rope_layers": "layers without rotary embedding",
    "moe": "num_experts",
    "moe_layers": "mlp_only_layers",
    "has_qkv_bias": "biases on q, k and v",
    "has_output_bias": "bias on the attention's output",
    "has_mlp_bias": "biases in the MLP",
    "qk_norm": "norms of queries and keys",
    "norm": "kind of norm",
    "norm_adds_one": "addition of 1 to norms' weights",
    "norm_places": "places of norms",
    "embedding_scale": "factor of embeddings",
    "residual_scale": "factor of what layers add",
    "logit_scale": "factor of logits",
    "logit_softcap": "cap of logits",
    "has_gated_mlp": "gate of the MLP",
    "hidden_act": "hidden_act",
    "norm_eps": "norms' epsilon",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "tie_word_embeddings": "tie_word_embeddings",
}


def seen_as(chosen: Family, config: Mapping[str, Any], known: Mapping[str, Family]) -> Family:
    """The chosen family, which takes keys that the config leaves out for what its own class does.

    Raises ConfigError, UnsupportedModelError where the model computes something else.
    """
    model_type = _model_type(config)
    if model_type is not None:
        own = _known_as(model_type, known)
        if own is chosen:
            return chosen
        if own is not None:
            return _seen_as_relative(chosen, own, config)
        why = refusal_of(model_type)
        if why is not None:
            raise _refused(chosen, model_type, why)
    defaults = like_llama(model_type or "") or {}
    family = replace(chosen, defaults={**chosen.defaults, **defaults})
    _check_keys(family, {**defaults, **config}, read_config(family, config), model_type)
    return family


def _model_type(config: Mapping[str, Any]) -> str | None:
    model_type = config.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        raise ConfigError(f"config.json: model_type is {model_type!r}, and should be text")
    return model_type


def _known_as(model_type: str, known: Mapping[str, Family]) -> Family | None:
    """The family of that name, or of that name spelled otherwise."""
    if model_type in known:
        return known[model_type]
    return next((known[name] for name in known if name.lower() == model_type.lower()), None)


def _seen_as_relative(chosen: Family, own: Family, config: Mapping[str, Any]) -> Family:
    """For a type that has a table too: both must read the same model."""
    if own.rotates_neighbours != chosen.rotates_neighbours:
        # A spec does not say it: the table does, and both tables may have the same names.
        turns = {True: "neighbours in a head", False: "halves of a head"}
        raise _refused(
            chosen,
            own.name,
            f"its rotary embedding turns {turns[own.rotates_neighbours]}, where that of a "
            f"{chosen.name} turns {turns[chosen.rotates_neighbours]}",
        )
    family = replace(chosen, defaults={**chosen.defaults, **own.defaults})
    means, reads = read_config(own, config), read_config(family, config)
    for name, what in _COMPUTED.items():
        left, right = getattr(means, name), getattr(reads, name)
        if left != right:
            raise _reads_otherwise(chosen, own, what, left, right)
    layer = differing_layer(means, reads)
    if layer is not None:
        raise _reads_otherwise(chosen, own, *layer)
    return family


def _reads_otherwise(
    chosen: Family, own: Family, what: str, left: object, right: object
) -> UnsupportedModelError:
    return _refused(chosen, own.name, f"its {what}: {left!r}, where a {chosen.name} has {right!r}")


def _check_keys(
    family: Family, config: Mapping[str, Any], spec: ModelSpec, model_type: str | None
) -> None:
    read = _keys_read(family)
    for key, value in config.items():
        is_neutral = NEUTRAL.get(key)
        if key in read or is_neutral is None:
            continue
        if key == "sliding_window" and config.get("use_sliding_window") is False:
            continue
        if not is_neutral(value, spec):
            raise _refused(
                family, model_type, f"its {key} is {value!r}, which a {family.name} cannot have"
            )


def _keys_read(family: Family) -> set[str]:
    """The keys that a family gives a meaning to."""
    keys = {*family.config_keys.values(), *family.extras, "head_dim"}
    keys |= {
        key
        for key in (family.qkv_bias, family.output_bias, family.mlp_bias)
        if isinstance(key, str)
    }
    return keys.union(*(quirk.keys for quirk in family.quirks))


def _refused(chosen: Family, model_type: str | None, why: str) -> UnsupportedModelError:
    what = " has no model_type" if model_type is None else f"'s model_type is {model_type!r}"
    return UnsupportedModelError(
        f"--family {chosen.name}: config.json{what}, and {why}. A "
        "family given by hand changes the names of tensors, not what a model computes"
    )


def warnings_about(
    family: Family, config: Mapping[str, Any], known: Mapping[str, Family]
) -> list[str]:
    """What to say of a model type that nothing is known of, or that is not there."""
    model_type = _model_type(config)
    if model_type is None:
        what = "it has no model_type"
    elif _known_as(model_type, known) is not None or like_llama(model_type) is not None:
        return []
    else:
        what = f"nothing is known of model_type {model_type!r}"
    return [
        f"config.json: {what}; it is converted as if it computed what a {family.name} does. "
        "Compare logits before you train"
    ]
