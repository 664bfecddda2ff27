"""Rotary position embedding on queries and keys that lie apart, in one launch.

The formula, its dtypes and its backward are those of `rope`. Here q and k come from two tensors of
any strides, and the results are new tensors. Values that lie beside the keys are copied with them.

Bytes for two-byte elements: 4 for each element of q and kv, forward and backward alike, and the
rows of cos and sin. Saved for backward: cos, sin and position_ids.
Shapes: q (tokens, H, d); kv (tokens, n, K, d), n = 1 keys alone, n = 2 keys and values; cos, sin
(positions, rotary_dim/2); position_ids (tokens,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanotron_fast.kernels.rope import check_positions
from nanotron_fast.kernels.rope.kernels import launch
from nanotron_fast.kernels.rope.reference import rotate_reference
from nanotron_fast.kernels.runtime.backend import uses_triton
from nanotron_fast.kernels.runtime.operators import operator


def rope_apart_reference(
    q: Tensor,
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same in plain torch, at least in fp32; what CPU tensors take."""
    if position_ids is None:
        cos, sin = cos[: len(q)], sin[: len(q)]
    else:
        cos, sin = cos.index_select(0, position_ids), sin.index_select(0, position_ids)
    k, *v = kv.unbind(1)
    q, k = (rotate_reference(x, cos, sin, interleaved) for x in (q, k))
    return q, torch.stack((k, *v), dim=1)


@operator("nanotron_fast::rope_apart")
def _turn(
    q: Tensor | None,
    kv: Tensor | None,
    q_shape: list[int],
    kv_shape: list[int],
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Contiguous q and kv. One of the two is there; the other stands for zeros."""
    if q is not None and q.stride(-1) != 1:
        q = q.contiguous()
    if kv is not None and kv.stride(-1) != 1:
        kv = kv.contiguous()
    given = q if q is not None else kv
    q_out, kv_out = given.new_empty(q_shape), given.new_empty(kv_shape)
    sources = [None] * kv_shape[1] if kv is None else kv.unbind(1)
    without_v = [None] * (2 - kv_shape[1])
    launch(
        [q, *sources, *without_v],
        [q_out, *kv_out.unbind(1), *without_v],
        cos,
        sin,
        position_ids,
        inverse=inverse,
        interleaved=interleaved,
    )
    return q_out, kv_out


@_turn.register_fake
def _(q, kv, q_shape, kv_shape, cos, sin, position_ids, interleaved, inverse):
    given = q if q is not None else kv
    return given.new_empty(q_shape), given.new_empty(kv_shape)


class _RopeApart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, cos, sin, position_ids, interleaved):
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.shapes, ctx.interleaved = (q.shape, kv.shape), interleaved
        ctx.set_materialize_grads(False)
        return _turn(q, kv, *ctx.shapes, cos, sin, position_ids, interleaved, False)

    @staticmethod
    def backward(ctx, *grads):
        if all(grad is None for grad in grads):
            return (None,) * 6
        cos, sin, position_ids = ctx.saved_tensors
        outs = _turn(*grads, *ctx.shapes, cos, sin, position_ids, ctx.interleaved, True)
        return *outs, None, None, None, None


def rope_apart(
    q: Tensor,
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Turns q and the keys of kv (RoFormer, Su et al., 2021).

    Args:
        q: (tokens, H, d), bf16, fp16 or fp32, any strides.
        kv: (tokens, 1 or 2, K, d) of q's dtype, any strides: keys, or keys and values.
        cos, sin: (positions, rotary_dim/2) of any dtype, read as fp32; they get no gradient. With
            rotary_dim < d the rest of a head passes through.
        position_ids: (tokens,) int32 or int64, rows of the tables; 0, 1, 2, ... where None. One
            outside the tables raises on the CPU; on a GPU its token becomes NaN.
        interleaved: pairs are neighbours, not halves of the head.

    Returns:
        q (tokens, H, d) and kv (tokens, 1 or 2, K, d), contiguous, in q's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit, or a position is outside the tables.
    """
    fits = q.dim() == 3 and kv.dim() == 4 and kv.shape[1] in (1, 2) and kv.dtype == q.dtype
    fits = fits and q.is_floating_point()
    if not fits or (kv.shape[0], kv.shape[-1]) != (q.shape[0], q.shape[-1]):
        raise ValueError(
            f"rope_apart: q {tuple(q.shape)} {q.dtype} beside kv {tuple(kv.shape)} {kv.dtype}"
        )
    if cos.dim() != 2 or cos.shape != sin.shape or not 2 <= 2 * cos.shape[1] <= q.shape[-1]:
        raise ValueError(
            f"rope_apart: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} "
            f"for head_dim {q.shape[-1]}"
        )
    check_positions("rope_apart", position_ids, q.shape[0], cos.shape[0])
    is_wide = q.dtype == torch.float64
    wide = torch.float64 if is_wide else torch.float32
    cos, sin = cos.to(wide).contiguous(), sin.to(wide).contiguous()
    if is_wide or not uses_triton(q):
        return rope_apart_reference(q, kv, cos, sin, position_ids, interleaved)
    if position_ids is not None:
        position_ids = position_ids.contiguous()
    return _RopeApart.apply(q, kv, cos, sin, position_ids, interleaved)
