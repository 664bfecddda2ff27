"""Gradients of weights straight into Nanotron's fp32 sums.

A parameter that has a `main_grad` gets its gradient added to that by our linears, embedding, head
and blocks, within their backward: no gradient in the low precision exists, and nothing is rounded
to it. What other functions make of the parameter is a `grad` as before, added after backward.

The accumulator of a model under DistributedDataParallel is left alone: torch waits there for every
parameter's `grad`, and Nanotron's hook sums what torch has put into its buckets.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from nanotron_fast.patch.nanotron.fallbacks import fall_back
from nanotron_fast.patch.nanotron.replacements.optimizer import has_own_memory, takes_main_grads
from nanotron_fast.patch.nanotron.targets import ON_DISABLE, DropInOptions

_given: weakref.WeakSet[Any] = weakref.WeakSet()


def zero_grad(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`FP32GradientAccumulator.zero_grad`, which ends a step: the next one's sums are handed out.

    The first step goes without: before its end nothing says whether the model is under DDP. What
    is watched by hooks is looked at anew after each step.
    """

    def replacement(self: Any) -> Any:
        result = original(self)
        reason = _why_not(self)
        if reason:
            fall_back("main_grad", original, reason)
            _take_back(self)
        else:
            _given.add(self)
            for name, element in self.fp32_grad_buffers.items():
                reason = _why_not_this(element["half"], element["fp32_grad"])
                if reason:
                    fall_back("main_grad", original, f"{name}: {reason}")
                    _take_back_one(element)
                else:
                    element["half"].main_grad = element["fp32_grad"]
        return result

    return replacement


def _why_not(accumulator: Any) -> str:
    if accumulator._is_accumulation_sync_step:
        return "the model is under DistributedDataParallel, which waits for every grad"
    if not takes_main_grads(type(accumulator)):
        return f"{type(accumulator).__name__} has a backward of its own"
    return ""


def _why_not_this(parameter: Tensor, buffer: Tensor) -> str:
    """Why one parameter gets none; empty where it may have one."""
    theirs = getattr(parameter, "main_grad", buffer)
    if theirs is not buffer:
        return "it has a main_grad of somebody else"
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return "it has hooks, which would not run"
    if not has_own_memory(parameter):
        return f"it is a {type(parameter).__name__} without memory of its own"
    return ""


def _take_back(accumulator: Any) -> None:
    for element in accumulator.fp32_grad_buffers.values():
        _take_back_one(element)


def _take_back_one(element: dict[str, Tensor]) -> None:
    if getattr(element["half"], "main_grad", None) is element["fp32_grad"]:
        del element["half"].main_grad


def _take_back_all() -> None:
    for accumulator in [*_given]:
        _take_back(accumulator)
    _given.clear()


ON_DISABLE.append(_take_back_all)
