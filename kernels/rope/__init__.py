"""Rotary position embedding and the split of a packed [q | k | v], in one pass.

    (a, b) -> (a * cos - b * sin,  b * cos + a * sin)        for every pair of q and k
    pairs: (i, i + rotary_dim/2), "halves", as Llama stores them; (2i, 2i + 1) interleaved

In fp32 and rounded once. What lies past rotary_dim in a head, and v, pass through. Backward is the
same with -sin, from (dq, dk, dv) into packed dqkv.

Bytes for two-byte elements: 4 for each element of qkv, forward and backward alike, and the rows of
cos and sin; in place nothing but the turned part of q and k is touched. Saved for backward: cos,
sin and position_ids.
Shapes: qkv (tokens, (H + 2K) * d); cos, sin (positions, rotary_dim/2) fp32; position_ids (tokens,);
q (tokens, H, d); k, v (tokens, K, d).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanotron_fast.kernels.rope.kernels import launch
from nanotron_fast.kernels.rope.tables import rope_tables as rope_tables
from nanotron_fast.kernels.runtime.backend import operator, uses_triton


def _split(qkv: Tensor, num_q_heads: int, num_kv_heads: int, head_dim: int) -> list[Tensor]:
    """Views (tokens, heads, head_dim) of q, k and v in a packed tensor."""
    heads = (num_q_heads, num_kv_heads, num_kv_heads)
    return list(qkv.unflatten(-1, (sum(heads), head_dim)).split(heads, dim=1))


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (tokens, heads, head_dim), cos and sin (tokens, rotary_dim/2)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    pairs = turning.unflatten(-1, (half, 2) if interleaved else (2, half))
    a, b = pairs.unbind(-1 if interleaved else -2)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1 if interleaved else -2)
    return torch.cat((turned.flatten(-2).to(x.dtype), rest), -1)


def rope_qkv_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain torch, at least in fp32; what CPU tensors take."""
    if position_ids is None:
        cos, sin = cos[: qkv.shape[0]], sin[: qkv.shape[0]]
    else:
        cos, sin = cos.index_select(0, position_ids), sin.index_select(0, position_ids)
    q, k, v = _split(qkv, num_q_heads, num_kv_heads, head_dim)
    q, k = (rotate_reference(x, cos, sin, interleaved) for x in (q, k))
    return q, k, v.clone(memory_format=torch.contiguous_format)


@operator("nanotron_fast::rope_qkv_forward")
def _forward(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    position_ids: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (tokens, H, d), k and v (tokens, K, d) in qkv's dtype."""
    sources = _split(qkv, num_q_heads, num_kv_heads, head_dim)
    outs = [torch.empty_like(src, memory_format=torch.contiguous_format) for src in sources]
    launch(sources, outs, cos, sin, position_ids, inverse=False, interleaved=interleaved)
    return outs[0], outs[1], outs[2]


@_forward.register_fake
def _(qkv, cos, sin, num_q_heads, num_kv_heads, head_dim, position_ids, interleaved):
    heads = (num_q_heads, num_kv_heads, num_kv_heads)
    return tuple(qkv.new_empty(qkv.shape[0], n, head_dim) for n in heads)


@operator("nanotron_fast::rope_qkv_backward")
def _backward(
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    position_ids: Tensor | None,
    interleaved: bool,
) -> Tensor:
    """dqkv (tokens, (H + 2K) * d) from gradients whose last dim is contiguous; one is there."""
    dqkv = _empty_packed(dq, dk, dv, num_q_heads, num_kv_heads, head_dim)
    outs = _split(dqkv, num_q_heads, num_kv_heads, head_dim)
    launch([dq, dk, dv], outs, cos, sin, position_ids, inverse=True, interleaved=interleaved)
    return dqkv


def _empty_packed(dq, dk, dv, num_q_heads: int, num_kv_heads: int, head_dim: int) -> Tensor:
    given = next(grad for grad in (dq, dk, dv) if grad is not None)
    return given.new_empty(given.shape[0], (num_q_heads + 2 * num_kv_heads) * head_dim)


@_backward.register_fake
def _(dq, dk, dv, cos, sin, num_q_heads, num_kv_heads, head_dim, position_ids, interleaved):
    return _empty_packed(dq, dk, dv, num_q_heads, num_kv_heads, head_dim)


@operator("nanotron_fast::rope_qkv_", mutates_args=("qkv",))
def _in_place(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    position_ids: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> None:
    parts = _split(qkv, num_q_heads, num_kv_heads, head_dim)
    how = {"inverse": inverse, "interleaved": interleaved, "in_place": True}
    launch(parts, parts, cos, sin, position_ids, **how)


@_in_place.register_fake
def _(qkv, cos, sin, num_q_heads, num_kv_heads, head_dim, position_ids, interleaved, inverse):
    return None


class _RopeQkv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, num_q_heads, num_kv_heads, head_dim, position_ids, interleaved):
        sizes = (num_q_heads, num_kv_heads, head_dim)
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.sizes, ctx.interleaved = sizes, interleaved
        ctx.set_materialize_grads(False)
        return _forward(qkv, cos, sin, *sizes, position_ids, interleaved)

    @staticmethod
    def backward(ctx, *grads):
        cos, sin, position_ids = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return (None,) * 8
        grads = [
            grad if grad is None or grad.stride(-1) == 1 else grad.contiguous() for grad in grads
        ]
        dqkv = _backward(*grads, cos, sin, *ctx.sizes, position_ids, ctx.interleaved)
        return dqkv, *(None,) * 7


def check_arguments(
    name: str,
    shape: torch.Size,
    cos: Tensor,
    sin: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    position_ids: Tensor | None,
) -> None:
    """Raises ValueError where a qkv of this shape, the tables and the heads do not fit."""
    if num_q_heads < 1 or num_kv_heads < 1:
        raise ValueError(f"{name}: {num_q_heads} query heads, {num_kv_heads} key heads")
    if len(shape) != 2 or shape[1] != (num_q_heads + 2 * num_kv_heads) * head_dim:
        raise ValueError(
            f"{name}: qkv {tuple(shape)} for {num_q_heads} + 2 * {num_kv_heads} heads of {head_dim}"
        )
    if cos.dim() != 2 or cos.shape != sin.shape or not 2 <= 2 * cos.shape[1] <= head_dim:
        raise ValueError(
            f"{name}: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} for head_dim {head_dim}"
        )
    if cos.dtype not in (torch.float32, torch.float64) or sin.dtype != cos.dtype:
        raise ValueError(f"{name}: cos {cos.dtype} and sin {sin.dtype}: the tables are fp32")
    if position_ids is None:
        if shape[0] > cos.shape[0]:
            raise ValueError(f"{name}: {shape[0]} tokens, tables for {cos.shape[0]} positions")
        return
    if position_ids.shape != shape[:1] or position_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: position_ids {tuple(position_ids.shape)} {position_ids.dtype} "
            f"for {shape[0]} tokens"
        )
    # On a GPU this would wait for the device; under torch.compile it would break the graph.
    if position_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (position_ids < 0) | (position_ids >= cos.shape[0])
        if outside.any():
            raise ValueError(
                f"{name}: position {position_ids[outside][0]}, tables for {cos.shape[0]} positions"
            )


def rope_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits a packed [q | k | v] and turns q and k (RoFormer, Su et al., 2021).

    Args:
        qkv: (tokens, (num_q_heads + 2 * num_kv_heads) * head_dim), bf16, fp16 or fp32.
        cos, sin: (positions, rotary_dim/2), fp32, from `rope_tables`; they get no gradient. With
            rotary_dim < head_dim the rest of a head passes through.
        position_ids: (tokens,) int32 or int64, rows of the tables; 0, 1, 2, ... where None. One
            outside the tables raises on the CPU; on a GPU, where looking would mean waiting, its
            token becomes NaN.
        interleaved: pairs are neighbours, not halves of the head.

    Returns:
        q (tokens, H, d), k and v (tokens, K, d), contiguous, in qkv's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit, or a position is outside the tables.
    """
    sizes = (num_q_heads, num_kv_heads, head_dim)
    check_arguments("rope_qkv", qkv.shape, cos, sin, *sizes, position_ids)
    if not uses_triton(qkv) or qkv.dtype == torch.float64 or cos.dtype == torch.float64:
        return rope_qkv_reference(qkv, cos, sin, *sizes, position_ids, interleaved)
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    if position_ids is not None:
        position_ids = position_ids.contiguous()
    return _RopeQkv.apply(
        qkv, cos.contiguous(), sin.contiguous(), *sizes, position_ids, interleaved
    )


def _turn_in_place(
    name: str,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    sizes: tuple[int, int, int],
    position_ids: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> Tensor:
    check_arguments(name, qkv.shape, cos, sin, *sizes, position_ids)
    if torch.is_grad_enabled() and qkv.requires_grad:
        raise ValueError(f"{name} writes over its input and has no gradient: use rope_qkv")
    if qkv.stride(1) != 1:
        raise ValueError(f"{name}: the rows of qkv are not contiguous: strides {qkv.stride()}")
    if not uses_triton(qkv) or qkv.dtype == torch.float64 or cos.dtype == torch.float64:
        parts = rope_qkv_reference(
            qkv, cos, -sin if inverse else sin, *sizes, position_ids, interleaved
        )
        return qkv.copy_(torch.cat(parts, dim=1).flatten(1))
    if position_ids is not None:
        position_ids = position_ids.contiguous()
    _in_place(qkv, cos.contiguous(), sin.contiguous(), *sizes, position_ids, interleaved, inverse)
    return qkv


def rope_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Turns q and k inside the packed tensor and returns it; v is not touched.

    For use within an autograd function: it has no gradient of its own. Arguments and errors are
    those of `rope_qkv`, and a qkv that requires a gradient raises too.
    """
    sizes = (num_q_heads, num_kv_heads, head_dim)
    return _turn_in_place("rope_qkv_", qkv, cos, sin, sizes, position_ids, interleaved, False)


def rope_qkv_backward_(
    dqkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Backward of `rope_qkv_`, the same way: turns packed dq and dk back, returns dqkv."""
    sizes, name = (num_q_heads, num_kv_heads, head_dim), "rope_qkv_backward_"
    return _turn_in_place(name, dqkv, cos, sin, sizes, position_ids, interleaved, True)
