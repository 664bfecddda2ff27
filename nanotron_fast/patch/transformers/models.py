"""Our operations under a transformers model: Llama, Qwen2 or Mistral, to compare and to train.

Nothing of transformers is changed, only what lies in the instances of one model:

- "rms_norm": `forward` of its norms;
- "rope": `forward` of its attentions, which is transformers' own, copied with one global name that
  means ours: `apply_rotary_pos_emb`. So nothing is assigned in transformers' module, where other
  models and threads would meet it, and no forward is forked. The copy has that module's globals of
  the moment when the model is enabled: who replaces one of them later enables the model again;
- "glu": `forward` of its MLPs;
- "cross_entropy": its `loss_function`.

The residual add is not taken into the norm. It lies in the forward of the decoder layer, around
which transformers 5 does its gradient checkpointing: a forward of the instance would go past it,
and only a fork for each version could add and norm in one pass.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.patch.lock import one_at_a_time
from nanotron_fast.patch.transformers.forwards import (
    causal_lm_loss,
    mlp_forward,
    norm_forward,
    rotary,
    why_no_gated_products,
    with_global,
)

logger = logging.getLogger(__name__)

TRANSFORMERS_OPS = ("rms_norm", "rope", "glu", "cross_entropy")
_ROTARY = "apply_rotary_pos_emb"
# Modules of transformers -> how the names of their classes begin.
_FAMILIES = {
    "transformers.models.llama.modeling_llama": "Llama",
    "transformers.models.qwen2.modeling_qwen2": "Qwen2",
    "transformers.models.mistral.modeling_mistral": "Mistral",
}
# A model's own dict holds by this name what of it is replaced. A copy of a model has a copy.
_RECORD = "_nanotron_fast_replaced"


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """A module that an operation did not take, and why. The model itself has the name ""."""

    op: str
    module: str
    reason: str


@dataclass(slots=True)
class TransformersReport:
    """How many modules each operation of `enable_transformers` took, and which it left alone."""

    replaced: dict[str, int] = field(default_factory=dict)
    left: list[LeftAlone] = field(default_factory=list)


@dataclass(slots=True)
class _Replaced:
    """An attribute of one instance; `before` holds what lay in its dict, if anything did."""

    owner: nn.Module
    name: str
    before: tuple[Any, ...]
    ours: Any


class _CannotReplace(Exception):
    """The reason, for the report."""


@one_at_a_time
def enable_transformers(
    model: nn.Module, ops: Iterable[str] | Literal["all"] = "all"
) -> TransformersReport:
    """Puts our operations under one transformers model: on a GPU the kernels, else the references.

    Of transformers 4.57 and 5: Llama, Qwen2 and Mistral, with or without a head. Other models, of
    the same class too, are not touched. A module that is not what it is expected to be keeps its
    own forward and is in the report. To enable again first puts back what was replaced.

    Args:
        model: the model itself, not a wrapper around it.
        ops: names of `TRANSFORMERS_OPS`, or "all".

    Raises:
        ConfigError: an operation is unknown.
        UnsupportedModelError: the model is of another class.
    """
    wanted = _checked_ops(ops)
    home = _home(model)
    disable_transformers(model)
    record: list[_Replaced] = []
    vars(model)[_RECORD] = record
    report = TransformersReport(dict.fromkeys(wanted, 0))
    names = {id(module): name for name, module in model.named_modules()}
    for op in wanted:
        # Modules of one class share the forwards that are made for it.
        made: dict[type, Callable[..., Any]] = {}
        for module in _modules(model, op):
            try:
                name, replacement = _make(module, op, home, made)
            except _CannotReplace as reason:
                report.left.append(LeftAlone(op, names[id(module)], str(reason)))
                continue
            own = vars(module)
            before = (own[name],) if name in own else ()
            record.append(_Replaced(module, name, before, replacement))
            own[name] = replacement
            report.replaced[op] += 1
    return report


@one_at_a_time
def disable_transformers(model: nn.Module) -> None:
    """Puts back what `enable_transformers` replaced in this model; without that, does nothing.

    What somebody has replaced after us stays theirs, and is logged as a warning.
    """
    for each in reversed(vars(model).pop(_RECORD, [])):
        own = vars(each.owner)
        if own.get(each.name) is not each.ours:
            logger.warning(
                "nanotron_fast: %s of a %s was replaced again by somebody else and stays so",
                each.name,
                type(each.owner).__name__,
            )
        elif each.before:
            own[each.name] = each.before[0]
        else:
            del own[each.name]


def _checked_ops(ops: Iterable[str]) -> tuple[str, ...]:
    if ops == "all":
        return TRANSFORMERS_OPS
    if isinstance(ops, str):
        raise ConfigError(f'ops is {ops!r}: give a set of names, or "all"')
    wanted = frozenset(ops)
    unknown = sorted(map(str, wanted - set(TRANSFORMERS_OPS)))
    if unknown:
        raise ConfigError(
            f"unknown operations {', '.join(unknown)}: choose from {', '.join(TRANSFORMERS_OPS)}"
        )
    return tuple(op for op in TRANSFORMERS_OPS if op in wanted)


def _home(model: nn.Module) -> types.ModuleType:
    """transformers' module that a model is of."""
    for each in type(model).__mro__:
        family = _FAMILIES.get(each.__module__)
        if family is not None and each.__name__ == f"{family}PreTrainedModel":
            return sys.modules[each.__module__]
    raise UnsupportedModelError(
        f"enable_transformers serves transformers' {', '.join(_FAMILIES.values())}, "
        f"not a {type(model).__module__}.{type(model).__qualname__}"
    )


def _modules(model: Any, op: str) -> Iterator[nn.Module]:
    """What an operation is for, by its place in the model."""
    if op == "cross_entropy":
        yield model
        return
    body = model.base_model
    for layer in body.layers:
        if op == "rms_norm":
            yield layer.input_layernorm
            yield layer.post_attention_layernorm
        elif op == "rope":
            yield layer.self_attn
        else:
            yield layer.mlp
    if op == "rms_norm":
        yield body.norm


def _make(
    module: Any, op: str, home: types.ModuleType, made: dict[type, Callable[..., Any]]
) -> tuple[str, Any]:
    """The attribute to replace, and with what. Raises _CannotReplace."""
    if op == "cross_entropy":
        _check_loss(module)
        return "_loss_function", causal_lm_loss
    kind = {"rms_norm": "RMSNorm", "rope": "Attention", "glu": "MLP"}[op]
    _check_forward(module, _FAMILIES[home.__name__] + kind, home)
    if op == "glu" and (reason := why_no_gated_products(module)):
        raise _CannotReplace(reason)
    if type(module) not in made:
        makers = {"rms_norm": lambda: norm_forward, "glu": lambda: mlp_forward}
        makers["rope"] = lambda: _turning(type(module).forward, home)
        made[type(module)] = makers[op]()
        made[type(module)].__name__ = "forward"  # by which a bound method is pickled
    return "forward", types.MethodType(made[type(module)], module)


def _check_forward(module: Any, expected: str, home: types.ModuleType) -> None:
    """Checks that a module is transformers' own, with the forward of its class."""
    kind = type(module)
    if (kind.__module__, kind.__name__) != (home.__name__, expected):
        raise _CannotReplace(f"is a {kind.__module__}.{kind.__qualname__}, not a {expected}")
    if not _is_of(home, kind.forward):
        raise _CannotReplace(f"{expected}.forward was replaced by somebody else")
    own = vars(module).get("forward")
    # transformers 4 leaves the bound method of the class where it has recorded hidden states.
    bound = isinstance(own, types.MethodType) and own.__self__ is module
    if own is not None and not (bound and own.__func__ is kind.forward):
        raise _CannotReplace("its forward was replaced by somebody else")


def _is_of(home: types.ModuleType, function: Any) -> bool:
    """Whether a function is of this module, beneath its decorators."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename == home.__file__


def _turning(forward: Any, home: types.ModuleType) -> Callable[..., Any]:
    """An attention's forward, with our rotary."""
    original = getattr(home, _ROTARY, None)
    if not _is_of(home, original):
        raise _CannotReplace(f"{home.__name__}.{_ROTARY} was replaced by somebody else")
    try:
        return with_global(forward, _ROTARY, rotary(original))  # type: ignore[arg-type]
    except LookupError as error:
        raise _CannotReplace(str(error)) from error


def _check_loss(model: Any) -> None:
    if not hasattr(model, "lm_head"):
        raise _CannotReplace(f"{type(model).__name__} has no causal language model's head")
    found = model.loss_function
    module, name = getattr(found, "__module__", ""), getattr(found, "__name__", repr(found))
    if (module, name) != ("transformers.loss.loss_utils", "ForCausalLMLoss"):
        raise _CannotReplace(f"its loss_function is {module}.{name}")
