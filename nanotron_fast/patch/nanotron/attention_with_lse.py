"""Attention that hands out its log-sum-exp too, which flash-attn does and Nanotron logs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanotron_fast.kernels.attention import attention_backward, attention_forward
from nanotron_fast.kernels.runtime.once import once_differentiable


class _WithLse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        out, lse = attention_forward(q, k, v, **options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable("attention_with_lse")
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return *attention_backward(dout, q, k, v, out, lse, **ctx.options), None


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`kernels.attention.attention` and the logarithm of each query's sum of weights.

    Returns:
        out in q's shape and dtype; lse (batch, H, seq_q) or (H, tokens), fp32, without a gradient.
    """
    out, lse = _WithLse.apply(q, k, v, options)
    return out, lse
