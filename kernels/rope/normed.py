"""RMSNorm of each head of queries and keys, and rotary position embedding, in one pass.

    n = x / sqrt(mean of x^2 over the head + eps) * w;  then n is turned as `rope` turns

In fp32 and rounded once, where a norm and a rotation apart would round twice. Backward turns the
gradient back, then goes through the norm; it computes 1 / sqrt(...) again, since it reads x anyway.

Bytes for two-byte elements: forward 4 for each element of q and k, backward 6; and the rows of cos
and sin. A norm and a rotation apart take 8 and 10. Saved for backward: q, k, cos, sin, position_ids
and the weights.
Shapes: q (tokens, H, d); k (tokens, K, d); weights (d,); cos, sin (positions, rotary_dim/2) fp32;
position_ids (tokens,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanotron_fast.kernels.rms_norm import rms_norm, rms_norm_reference
from nanotron_fast.kernels.rope import check_positions
from nanotron_fast.kernels.rope.normed_operators import backward, forward
from nanotron_fast.kernels.rope.reference import rotate_reference
from nanotron_fast.kernels.runtime.backend import uses_triton


def rope_normed_reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
    zero_centered: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same in plain torch, at least in fp32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    normed = [
        rms_norm_reference(x.to(wide), weight.to(wide), eps, None, zero_centered)
        for x, weight in ((q, q_weight), (k, k_weight))
    ]
    return _turned(normed, q.dtype, cos, sin, position_ids, interleaved)


def _turned(
    normed: list[Tensor],
    dtype: torch.dtype,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    if position_ids is None:
        cos, sin = cos[: len(normed[0])], sin[: len(normed[0])]
    else:
        cos, sin = cos.index_select(0, position_ids), sin.index_select(0, position_ids)
    q, k = (rotate_reference(x, cos, sin, interleaved).to(dtype) for x in normed)
    return q, k


class _RopeNormed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, position_ids, options):
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, position_ids)
        ctx.options = options
        return forward(q, k, q_weight, k_weight, cos, sin, position_ids, **options)

    @staticmethod
    def backward(ctx, dq, dk):
        dq, dk = (each if each.stride(-1) == 1 else each.contiguous() for each in (dq, dk))
        saved = ctx.saved_tensors  # once: what is computed again is given only once
        dq, dk, dw = backward(dq, dk, *saved, **ctx.options)
        dw_q, dw_k = (part.to(weight.dtype) for part, weight in zip(dw, saved[2:4], strict=True))
        return dq, dk, dw_q, dw_k, None, None, None, None


def rope_normed(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
    zero_centered: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalises each head of q and k, and turns it (as Qwen3 does: Yang et al., 2025).

    Args:
        q: (tokens, H, d), bf16, fp16 or fp32, any strides.
        k: (tokens, K, d) of q's dtype, any strides.
        q_weight, k_weight: (d,), of any of these dtypes.
        cos, sin: (positions, rotary_dim/2) of any dtype, read as fp32; they get no gradient. With
            rotary_dim < d the rest of a head is normalised alone.
        eps: added to the mean square.
        position_ids: (tokens,) int32 or int64, rows of the tables; 0, 1, 2, ... where None. One
            outside the tables raises on the CPU; on a GPU its token becomes NaN.
        interleaved: pairs are neighbours, not halves of the head.
        zero_centered: the weights are stored less one, as Gemma does.

    Returns:
        q (tokens, H, d) and k (tokens, K, d), contiguous, in q's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit, or a position is outside the tables.
    """
    fits = q.dim() == k.dim() == 3 and k.dtype == q.dtype and q.is_floating_point()
    if not fits or (k.shape[0], k.shape[2]) != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"rope_normed: q {tuple(q.shape)} {q.dtype} beside k {tuple(k.shape)} {k.dtype}"
        )
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.shape != q.shape[2:]:
            raise ValueError(f"rope_normed: {name} {tuple(weight.shape)} for heads of {q.shape[2]}")
    if cos.dim() != 2 or cos.shape != sin.shape or not 2 <= 2 * cos.shape[1] <= q.shape[2]:
        raise ValueError(
            f"rope_normed: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} "
            f"for head_dim {q.shape[2]}"
        )
    check_positions("rope_normed", position_ids, q.shape[0], cos.shape[0])
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = cos.to(wide).contiguous(), sin.to(wide).contiguous()
    options = {"eps": float(eps), "interleaved": interleaved, "zero_centered": zero_centered}
    if not uses_triton(q) or wide != torch.float32:
        # By the norm's own function, whose backward takes half the passes of the reference's.
        normed = [
            rms_norm(x.to(wide), weight.to(wide), eps, zero_centered=zero_centered)
            for x, weight in ((q, q_weight), (k, k_weight))
        ]
        return _turned(normed, q.dtype, cos, sin, position_ids, interleaved)
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    if position_ids is not None:
        position_ids = position_ids.contiguous()
    return _RopeNormed.apply(
        q, k, q_weight.contiguous(), k_weight.contiguous(), cos, sin, position_ids, options
    )
