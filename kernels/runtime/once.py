"""Backward passes that have no gradient of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def once_differentiable(name: str) -> Callable[[Backward], Backward]:
    """Has the gradients that a backward gives raise where somebody differentiates them.

    torch's decorator of this name does so only where the incoming gradient requires one. Of a loss
    whose gradient is a number, a gradient penalty would take ours for constants, and say nothing.

    Args:
        name: of the operation, for the error.
    """
    message = f"{name} has no second derivative".encode()

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def once(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            # Under create_graph alone; torch.compile refuses a second derivative by itself.
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return backward(ctx, *gradients)
            with torch.no_grad():
                found = backward(ctx, *gradients)
            leaves = [each if each is None else each.detach().requires_grad_() for each in found]
            refusing: Any = torch._C._functions.DelayedError(message, len(leaves))
            raised: tuple[Tensor | None, ...] = refusing(*leaves)
            return raised

        return once

    return decorate
