"""Attention with a sink: a score of each head's own beside those of the keys, without a value.

    y = out * s,  s = sigmoid(lse - sink): the share of the weights that the keys keep

with out and lse of attention without it, by whichever implementation. Backward takes the same
implementation's: the gradient of the scores is p * (s * dy v^T - s^2 * dy out^T), and so that of
attention for s * dy whose output is said to be y, since dy y^T is s * dy out^T. No pass over the
keys is added, and no score is kept.
Saved for backward: q, k, v, y, lse, the sinks.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from nanotron_fast.kernels.attention import attention_backward, attention_forward
from nanotron_fast.kernels.runtime.once import once_differentiable


class _WithSinks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, options: dict[str, Any]
    ) -> Tensor:
        out, lse = attention_forward(q, k, v, **options)
        kept = _kept(lse, sinks)
        y = (out.float() * kept).to(out.dtype)
        ctx.save_for_backward(q, k, v, sinks, y, lse)
        ctx.options = options
        return y

    @staticmethod
    @once_differentiable("attention_with_sinks")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, y, lse = ctx.saved_tensors
        kept = _kept(lse, sinks)
        scaled = (dy.float() * kept).to(dy.dtype)
        dq, dk, dv = attention_backward(scaled, q, k, v, y, lse, **ctx.options)
        d_sinks = None
        if ctx.needs_input_grad[3]:
            per_row = (dy.float() * y.float()).sum(-1, keepdim=True) * (1 - kept)
            d_sinks = -per_row.flatten(0, -3).sum(0).squeeze(-1).to(sinks.dtype)
        return dq, dk, dv, d_sinks, None


def _kept(lse: Tensor, sinks: Tensor) -> Tensor:
    """(..., seq, H, 1) of lse (..., H, seq); 0 where a query sees no key."""
    return torch.sigmoid(lse.float() - sinks.float()[:, None]).transpose(-1, -2)[..., None]


def attention_with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, **options: Any) -> Tensor:
    """Causal attention whose heads have sinks, as gpt-oss has it.

    Args:
        q, k, v: as of `attention`.
        sinks: (H,), any of its dtypes: the score, not scaled, of each query head's sink.
        options: causal, cu_seqlens, max_seqlen, window, scale and softcap of `attention`.

    Returns:
        q's shape and dtype.

    Raises:
        ValueError: as `attention`, and where sinks do not fit q.
    """
    if sinks.shape != q.shape[-2:-1]:
        raise ValueError(
            f"attention_with_sinks: sinks {tuple(sinks.shape)} for heads of q {tuple(q.shape)}"
        )
    return cast(Tensor, _WithSinks.apply(q, k, v, sinks, options))
