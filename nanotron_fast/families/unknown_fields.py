"""Fields of a model_config.json that no class of Nanotron's main has: those of its branches.

They go along: in `config.json` under a key of their own, from there through the side file, and
back into model_config.json. One that is known to change what a model computes is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.families.model_types import NEUTRAL
from nanotron_fast.formats.nanotron.classes import HEAD_DIM, MOE_FIELDS, class_of, classes
from nanotron_fast.model.spec import ModelSpec

# The key of config.json that holds them.
UNKNOWN_FIELDS = "nanotron_model_config"
_MOE = "moe_config"
# Of a mixture of experts on Nanotron's branches: values that change nothing.
_MOE_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "moe_router_score_function": (None, "softmax"),
    "moe_router_topk_scaling_factor": (None, 1),
    "moe_router_expert_bias": (None, False),
    "moe_router_num_groups": (None, 1),
    "moe_expert_capacity_factor": (None,),
}


def unknown_fields(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """Those of a model_config.json; of its moe_config, under that name. UnsupportedModelError."""
    known = {*class_of(config).fields, HEAD_DIM, _MOE}
    unknown = {key: value for key, value in config.items() if key not in known}
    moe = config.get(_MOE)
    inner: dict[str, Any] = {}
    if isinstance(moe, Mapping):
        inner = {key: value for key, value in moe.items() if key not in MOE_FIELDS}
    for key, value in unknown.items():
        if key in NEUTRAL and not NEUTRAL[key](value, spec):
            raise _refused(key, value)
    for key, value in inner.items():
        if key in _MOE_NEUTRAL and value not in _MOE_NEUTRAL[key]:
            raise _refused(f"{_MOE}.{key}", value)
    return {**unknown, **({_MOE: inner} if inner else {})}


def _refused(name: str, value: object) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"model_config.json: {name} is {value!r}, which Nanotron's main does not have, nor Hugging "
        "Face's class: it would compute something else"
    )


def unknown_fields_warnings(unknown: Mapping[str, Any]) -> list[str]:
    """One that names them all."""
    names = [name for name in unknown if name != _MOE]
    names += [f"{_MOE}.{name}" for name in unknown.get(_MOE, ())]
    if not names:
        return []
    return [
        f"model_config.json: Nanotron's main has no {', '.join(names)}; convert keeps them in "
        f"config.json under {UNKNOWN_FIELDS}, where they have no effect"
    ]


def with_unknown_fields(
    model_config: dict[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """A new model_config.json with what its config.json has kept, and a warning. ConfigError."""
    kept = config.get(UNKNOWN_FIELDS)
    if kept is None:
        return model_config, []
    moe = kept.get(_MOE) if isinstance(kept, Mapping) else None
    if not isinstance(kept, Mapping) or not isinstance(moe, (Mapping, type(None))):
        raise ConfigError(f"config.json: {UNKNOWN_FIELDS} is {kept!r}, and should be an object")
    # What some class of main's has is decided by the model, not by what lies beside it.
    known = {HEAD_DIM, *(name for each in classes() for name in each.fields)}
    added = {key: kept[key] for key in kept if key not in known}
    result = {**model_config, **added}
    names = list(added)
    if moe and model_config.get(_MOE):
        inner = {key: moe[key] for key in moe if key not in MOE_FIELDS}
        result[_MOE] = {**model_config[_MOE], **inner}
        names += [f"{_MOE}.{key}" for key in inner]
    if not names:
        return model_config, []
    return result, [
        f"model_config.json has {', '.join(names)} of the branch that the model came from; "
        "Nanotron's main has no such fields, and config.yaml leaves them out"
    ]
