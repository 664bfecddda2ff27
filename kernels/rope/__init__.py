"""Rotary position embedding and the split of a packed [q | k | v], in one pass.

    (a, b) -> (a * cos - b * sin,  b * cos + a * sin)        for every pair of q and k
    pairs: (i, i + rotary_dim/2), "halves", as Llama stores them; (2i, 2i + 1) interleaved

In fp32 and rounded once. What lies past rotary_dim in a head, and v, pass through. Backward is the
same with -sin, from (dq, dk, dv) into packed dqkv.

Bytes for two-byte elements: 4 for each element of qkv, forward and backward alike, and the rows of
cos and sin. In place nothing but the turned part of q and k is touched. Saved for backward: cos,
sin and position_ids.
Shapes: qkv (tokens, (H + 2K) * d); cos, sin (positions, rotary_dim/2) fp32; position_ids (tokens,);
q (tokens, H, d); k, v (tokens, K, d).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanotron_fast.kernels.rope import operators
from nanotron_fast.kernels.rope.reference import (
    pack_heads,
    rope_qkv_reference,
    rotate_in_place,
    rotate_reference,
)
from nanotron_fast.kernels.rope.tables import rope_tables
from nanotron_fast.kernels.runtime.backend import uses_triton

__all__ = [
    "check_arguments",
    "check_positions",
    "rope_qkv",
    "rope_qkv_",
    "rope_qkv_backward",
    "rope_qkv_backward_",
    "rope_qkv_reference",
    "rope_tables",
    "rotate_reference",
]


class _RopeQkv(torch.autograd.Function):
    """`heads`: num_q_heads, num_kv_heads, head_dim."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, position_ids, heads, interleaved):
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.heads, ctx.interleaved = heads, interleaved
        ctx.set_materialize_grads(False)
        return operators.forward(qkv, cos, sin, *heads, position_ids, interleaved)

    @staticmethod
    def backward(ctx, *grads):
        cos, sin, position_ids = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return (None,) * 6
        grads = [
            grad if grad is None or grad.stride(-1) == 1 else grad.contiguous() for grad in grads
        ]
        dqkv = operators.backward(*grads, cos, sin, *ctx.heads, position_ids, ctx.interleaved)
        return dqkv, None, None, None, None, None


def check_arguments(
    name: str,
    shape: torch.Size,
    cos: Tensor,
    sin: Tensor,
    *,
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
        raise ValueError(
            f"{name}: cos {cos.dtype} and sin {sin.dtype}: the tables are fp32. FSDP2 casts what a "
            "module is given, unless its MixedPrecisionPolicy has cast_forward_inputs=False"
        )
    check_positions(name, position_ids, shape[0], cos.shape[0])


def check_positions(
    name: str, position_ids: Tensor | None, num_tokens: int, num_positions: int
) -> None:
    """Raises ValueError where the tables do not have a row for each token."""
    if position_ids is None:
        if num_tokens > num_positions:
            raise ValueError(f"{name}: {num_tokens} tokens, tables for {num_positions} positions")
        return
    is_whole = position_ids.dtype in (torch.int32, torch.int64)
    if position_ids.shape != (num_tokens,) or not is_whole:
        raise ValueError(
            f"{name}: position_ids {tuple(position_ids.shape)} {position_ids.dtype} "
            f"for {num_tokens} tokens"
        )
    # On a GPU this would wait for the device; under torch.compile it would break the graph.
    if position_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (position_ids < 0) | (position_ids >= num_positions)
        if outside.any():
            raise ValueError(
                f"{name}: position {position_ids[outside][0]}, tables for {num_positions} positions"
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
    check_arguments(
        "rope_qkv",
        qkv.shape,
        cos,
        sin,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        position_ids=position_ids,
    )
    if not qkv.is_floating_point():
        raise ValueError(f"rope_qkv: qkv is {qkv.dtype}")
    heads = (num_q_heads, num_kv_heads, head_dim)
    if not uses_triton(qkv) or qkv.dtype == torch.float64 or cos.dtype == torch.float64:
        return rope_qkv_reference(qkv, cos, sin, *heads, position_ids, interleaved)
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    if position_ids is not None:
        position_ids = position_ids.contiguous()
    return _RopeQkv.apply(qkv, cos.contiguous(), sin.contiguous(), position_ids, heads, interleaved)


def _turn_in_place(
    name: str,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: dict[str, int],
    position_ids: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> Tensor:
    """`heads`: num_q_heads, num_kv_heads and head_dim. `inverse` turns back."""
    check_arguments(name, qkv.shape, cos, sin, position_ids=position_ids, **heads)
    if torch.is_grad_enabled() and qkv.requires_grad:
        raise ValueError(f"{name} writes over its input and has no gradient: use rope_qkv")
    if qkv.stride(1) != 1:
        raise ValueError(f"{name}: the rows of qkv are not contiguous: strides {qkv.stride()}")
    if not qkv.is_floating_point() or (len(qkv) > 1 and qkv.stride(0) < qkv.shape[1]):
        raise ValueError(f"{name}: qkv {qkv.dtype} cannot be turned, with strides {qkv.stride()}")
    if not uses_triton(qkv) or qkv.dtype == torch.float64 or cos.dtype == torch.float64:
        if inverse:
            sin = -sin
        if qkv.dtype == cos.dtype:
            turning = heads["num_q_heads"] + heads["num_kv_heads"]
            packed = qkv.unflatten(1, (-1, heads["head_dim"]))
            rotate_in_place(packed[:, :turning], cos, sin, position_ids, interleaved)
            return qkv
        parts = rope_qkv_reference(
            qkv, cos, sin, **heads, position_ids=position_ids, interleaved=interleaved
        )
        return qkv.copy_(torch.cat(parts, dim=1).flatten(1))
    operators.in_place(
        qkv,
        cos.contiguous(),
        sin.contiguous(),
        **heads,
        position_ids=None if position_ids is None else position_ids.contiguous(),
        interleaved=interleaved,
        inverse=inverse,
    )
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
    return _turn_in_place(
        "rope_qkv_",
        qkv,
        cos,
        sin,
        heads={"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim},
        position_ids=position_ids,
        interleaved=interleaved,
        inverse=False,
    )


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
    return _turn_in_place(
        "rope_qkv_backward_",
        dqkv,
        cos,
        sin,
        heads={"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim},
        position_ids=position_ids,
        interleaved=interleaved,
        inverse=True,
    )


def rope_qkv_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Backward of `rope_qkv_` from gradients that lie apart: packs and turns back in one pass.

    4 bytes for each element of qkv, of two-byte elements; three copies into one tensor that is then
    turned in place take 8 for q and k and 4 for v. For use within an autograd function.

    Args:
        dq: (..., H, d), of any strides; dimensions before H are the tokens in their order. Where no
            one stride leads from token to token, it is copied first.
        dk, dv: (..., K, d), the same of the keys and the values.
        cos, sin, position_ids, interleaved: as of `rope_qkv`.

    Returns:
        dqkv (tokens, (H + 2K) * d), contiguous, in dq's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit, or a position is outside the tables.
    """
    name, is_apart = "rope_qkv_backward", dq.dim() == dk.dim() >= 3 and dk.shape == dv.shape
    is_even = is_apart and (*dq.shape[:-2], dq.shape[-1]) == (*dk.shape[:-2], dk.shape[-1])
    if not is_even or not dq.dtype == dk.dtype == dv.dtype:
        raise ValueError(
            f"{name}: dq {tuple(dq.shape)} {dq.dtype}, dk {tuple(dk.shape)} {dk.dtype}, "
            f"dv {tuple(dv.shape)} {dv.dtype}"
        )
    (num_q_heads, head_dim), num_kv_heads = dq.shape[-2:], dk.shape[-2]
    heads = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    shape = torch.Size((dq.shape[:-2].numel(), (num_q_heads + 2 * num_kv_heads) * head_dim))
    check_arguments(name, shape, cos, sin, position_ids=position_ids, **heads)
    if not uses_triton(dq) or dq.dtype == torch.float64 or cos.dtype == torch.float64:
        dqkv = pack_heads(dq, dk, dv)
        return rope_qkv_backward_(
            dqkv, cos, sin, **heads, position_ids=position_ids, interleaved=interleaved
        )
    rows = [each.flatten(0, -3) for each in (dq, dk, dv)]
    return operators.backward(
        *(each if each.stride(-1) == 1 else each.contiguous() for each in rows),
        cos.contiguous(),
        sin.contiguous(),
        **heads,
        position_ids=None if position_ids is None else position_ids.contiguous(),
        interleaved=interleaved,
    )
