"""Telling when a backward pass has left a module: the gradients of all that it trains are there.

Our fused functions add to `main_grad` within their own backward, so that no hook of a parameter
tells. The gradient of a module's input does: it is complete when every function of the module has
run. A function in front of the module, which changes nothing, is told then. It runs after what was
found with that gradient: autograd adds gradients to parameters before it goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class _Passing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, passed: Callable[[], None]) -> Tensor:
        ctx.passed = passed
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        ctx.passed()
        return dx, None


def when_left(module: nn.Module, passed: Callable[[], None]) -> RemovableHandle:
    """Calls `passed` each time when the backward pass of a micro-batch has left a module.

    Never where the module's input has no gradient.

    Args:
        module: all that it computes depends on its first positional argument, a tensor. It may be
            recomputed in backward.
    """

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = args
        if torch.is_grad_enabled() and x.requires_grad:
            x = _Passing.apply(x, passed)
        return (x, *others)

    return module.register_forward_pre_hook(before)
