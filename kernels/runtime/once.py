"""Backward passes that have no gradient of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


class _Opened:
    """A context whose saved tensors are opened: checkpointing gives them once alone."""

    def __init__(self, ctx: Any) -> None:
        self.__dict__.update(_ctx=ctx, saved_tensors=ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._ctx, name, value)


def once_differentiable(
    name: str, *, unless: Callable[[Any], bool] = lambda ctx: False
) -> Callable[[Backward], Backward]:
    """Has the gradients that a backward gives raise where somebody differentiates them.

    torch's decorator of this name does so only where the incoming gradient requires one. Of a loss
    whose gradient is a number, a gradient penalty would take ours for constants, and say nothing.

    The gradients hang on those that came in and on the saved tensors: autograd passes by what does
    not lead to the tensors that it was asked about. So each input that they are a function of, or
    an output, is to be among the saved ones.

    Args:
        name: of the operation, for the error.
        unless: whether autograd itself may follow the backward, by its context.
    """
    message = f"{name} has no second derivative".encode()

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def once(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            # Under create_graph alone; torch.compile refuses a second derivative by itself.
            if not torch.is_grad_enabled() or torch.compiler.is_compiling() or unless(ctx):
                return backward(ctx, *gradients)
            opened = _Opened(ctx)
            with torch.no_grad():
                found = backward(opened, *gradients)
            known = (*gradients, *opened.saved_tensors)
            leading = [each for each in known if each is not None and each.requires_grad]
            refusing: Any = torch._C._functions.DelayedError(message, len(found) + len(leading))
            raised: tuple[Tensor | None, ...] = refusing(*found, *leading)
            return raised[: len(found)]

        return once

    return decorate
