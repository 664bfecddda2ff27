"""Linear layer and cross entropy with the logits of all tokens: `linear_cross_entropy` says when.

Forward keeps the logits, and backward turns them into their gradient in place, with the factor of
each token's loss in the same kernel. So both products round once, and dweight is written in the
weight's dtype or added to its main gradient by the product itself. A second backward finds the
logits gone, and computes them again where they were.

For eager mode alone: torch.compile would copy the logits that it must not write over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanotron_fast.kernels.cross_entropy.operators import gradient_
from nanotron_fast.kernels.linear_cross_entropy.operators import (
    Gradients,
    Settings,
    logits_buffer,
    losses_of,
)
from nanotron_fast.kernels.runtime.main_grad import eager_main_grad
from nanotron_fast.kernels.runtime.once import once_differentiable


class WholeLosses(torch.autograd.Function):
    """The loss of every token, and z, which has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, settings: Settings
    ) -> tuple[Tensor, Tensor]:
        buffer = logits_buffer(hidden, hidden.shape[0], weight.shape[0])
        logits = torch.mm(hidden, weight.to(hidden.dtype).t(), out=buffer)
        loss, z, maximum_and_sum = losses_of(logits, target, settings.ranks, settings.terms)
        ctx.save_for_backward(hidden, weight, target, maximum_and_sum, logits)
        ctx.settings, ctx.main_grad, ctx.is_spent = settings, eager_main_grad(weight), False
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    @once_differentiable("linear_cross_entropy")
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, maximum_and_sum, saved = ctx.saved_tensors
        # With a version of its own: what is saved may be asked for again, and is written over.
        logits = saved.data
        # An fp32 weight is cast again. Kept, that would be 2 bytes an element for each micro-batch
        # that waits for its backward; spared, the traffic of 6 beside 6 * tokens FLOPs.
        low = weight.to(hidden.dtype)
        if ctx.is_spent:
            torch.mm(hidden, low.t(), out=logits)
        ctx.is_spent = True
        gradient_(
            logits,
            target,
            maximum_and_sum,
            dloss.to(maximum_and_sum.dtype).contiguous(),
            first_col=ctx.settings.ranks.rank * weight.shape[0],
            **ctx.settings.terms,
        )
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        dhidden = hidden.new_empty(hidden.shape) if of_hidden else None
        main_grad = ctx.main_grad if of_weight else None
        dweight = torch.empty_like(weight) if of_weight and main_grad is None else None
        gradients = Gradients(
            hidden,
            low,
            ctx.settings.ranks,
            dhidden,
            dweight if main_grad is None else main_grad,
            is_added=main_grad is not None,
        )
        gradients.add(slice(None), logits)
        gradients.finish()
        return dhidden, dweight, None, None
