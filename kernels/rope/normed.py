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

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanotron_fast.kernels.rms_norm import rms_norm, rms_norm_reference
from nanotron_fast.kernels.rope.reference import rotate_reference
from nanotron_fast.kernels.runtime import occupancy
from nanotron_fast.kernels.runtime.backend import on_grid, uses_triton
from nanotron_fast.kernels.runtime.operators import operator
from nanotron_fast.kernels.runtime.sizes import ceil_div, next_power_of_2

# Elements that a program holds at a time of each tensor: fewer of wide heads, and where a part of a
# head does not turn, which lies in registers of its own.
_BLOCK_ELEMENTS, _BLOCK_ELEMENTS_WIDE = 2048, 1024


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


@triton.jit
def _load_pairs(
    ptr,
    mask,
    INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF_COLS: tl.constexpr,
):
    """Both members of each pair, (TOKENS, HEADS, HALF_COLS) in fp32; ptr has one a head."""
    if INTERLEAVED:
        cols = tl.arange(0, 2 * HALF_COLS)[None, None, :]
        pairs = tl.load(ptr + cols, mask=mask & (cols < 2 * HALF), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(pairs, (TOKENS, HEADS, HALF_COLS, 2)))
    else:
        cols = tl.arange(0, HALF_COLS)[None, None, :]
        a = tl.load(ptr + cols, mask=mask & (cols < HALF), other=0.0).to(tl.float32)
        b = tl.load(ptr + HALF + cols, mask=mask & (cols < HALF), other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store_pairs(
    ptr,
    a,
    b,
    mask,
    INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF_COLS: tl.constexpr,
):
    dtype = ptr.dtype.element_ty
    if INTERLEAVED:
        cols = tl.arange(0, 2 * HALF_COLS)[None, None, :]
        pairs = tl.reshape(tl.join(a, b), (TOKENS, HEADS, 2 * HALF_COLS))
        tl.store(ptr + cols, pairs.to(dtype), mask=mask & (cols < 2 * HALF))
    else:
        cols = tl.arange(0, HALF_COLS)[None, None, :]
        tl.store(ptr + cols, a.to(dtype), mask=mask & (cols < HALF))
        tl.store(ptr + HALF + cols, b.to(dtype), mask=mask & (cols < HALF))


@triton.jit
def _load_rest(ptr, mask, cols, HALF: tl.constexpr, HEAD_DIM: tl.constexpr):
    """What lies past the pairs in a head, in fp32."""
    inside = mask & (cols >= 2 * HALF) & (cols < HEAD_DIM)
    return tl.load(ptr + cols, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _table_rows(
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    tokens,
    num_tokens,
    num_positions,
    HALF: tl.constexpr,
    HALF_COLS: tl.constexpr,
):
    """Each token's cosines and sines: zeros where there is no token, NaN outside the tables."""
    is_token = tokens < num_tokens
    positions = tokens
    if position_ids_ptr is not None:
        positions = tl.load(position_ids_ptr + tokens, mask=is_token, other=0).to(tl.int64)
    cols = tl.arange(0, HALF_COLS)[None, None, :]
    inside = is_token & (cols < HALF)
    is_known = inside & (positions >= 0) & (positions < num_positions)
    cos = tl.load(cos_ptr + positions * HALF + cols, mask=is_known, other=float("nan"))
    sin = tl.load(sin_ptr + positions * HALF + cols, mask=is_known, other=float("nan"))
    return tl.where(inside, cos, 0.0), tl.where(inside, sin, 0.0)


@triton.jit
def _forward_heads(
    x_ptr,
    y_ptr,
    weight_ptr,
    x_token_stride,
    x_head_stride,
    num_heads,
    tokens,
    num_tokens,
    cos,
    sin,
    eps,
    INTERLEAVED: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_COLS: tl.constexpr,
    HALF_COLS: tl.constexpr,
):
    cols = tl.arange(0, HEAD_COLS)[None, None, :]
    everywhere = tl.zeros((1, 1, 1), dtype=tl.int32) == 0
    wa, wb = _load_pairs(weight_ptr, everywhere, INTERLEAVED, HALF, 1, 1, HALF_COLS)
    if ZERO_CENTERED:
        wa += 1.0
        wb += 1.0
    for first in range(0, num_heads, HEADS):
        heads = first + tl.arange(0, HEADS)[None, :, None]
        mask = (tokens < num_tokens) & (heads < num_heads)
        src = x_ptr + tokens * x_token_stride + heads.to(tl.int64) * x_head_stride
        dst = y_ptr + (tokens * num_heads + heads) * HEAD_DIM
        a, b = _load_pairs(src, mask, INTERLEAVED, HALF, TOKENS, HEADS, HALF_COLS)
        squares = tl.sum(a * a + b * b, axis=2, keep_dims=True)
        if 2 * HALF < HEAD_DIM:
            rest = _load_rest(src, mask, cols, HALF, HEAD_DIM)
            squares += tl.sum(rest * rest, axis=2, keep_dims=True)
        rstd = tl.rsqrt(squares / HEAD_DIM + eps)
        a, b = a * rstd * wa, b * rstd * wb
        _store_pairs(
            dst,
            a * cos - b * sin,
            b * cos + a * sin,
            mask,
            INTERLEAVED,
            HALF,
            TOKENS,
            HEADS,
            HALF_COLS,
        )
        if 2 * HALF < HEAD_DIM:
            w_rest = _load_rest(weight_ptr, everywhere, cols, HALF, HEAD_DIM)
            if ZERO_CENTERED:
                w_rest += 1.0
            inside = mask & (cols >= 2 * HALF) & (cols < HEAD_DIM)
            tl.store(dst + cols, (rest * rstd * w_rest).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    q_out_ptr,
    k_out_ptr,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    num_tokens,
    num_positions,
    num_q_heads,
    num_k_heads,
    eps,
    INTERLEAVED: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HEAD_COLS: tl.constexpr,
    HALF_COLS: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    # fmt: off
    cos, sin = _table_rows(
        cos_ptr, sin_ptr, position_ids_ptr, tokens, num_tokens, num_positions, HALF, HALF_COLS
    )
    _forward_heads(
        q_ptr, q_out_ptr, q_weight_ptr, q_token_stride, q_head_stride, num_q_heads, tokens,
        num_tokens, cos, sin, eps, INTERLEAVED, ZERO_CENTERED, HEAD_DIM, HALF, TOKENS, Q_HEADS,
        HEAD_COLS, HALF_COLS,
    )
    _forward_heads(
        k_ptr, k_out_ptr, k_weight_ptr, k_token_stride, k_head_stride, num_k_heads, tokens,
        num_tokens, cos, sin, eps, INTERLEAVED, ZERO_CENTERED, HEAD_DIM, HALF, TOKENS, K_HEADS,
        HEAD_COLS, HALF_COLS,
    )
    # fmt: on


@triton.jit
def _backward_heads(
    dy_ptr,
    x_ptr,
    dx_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    partial_dw_ptr,
    dy_token_stride,
    dy_head_stride,
    x_token_stride,
    x_head_stride,
    num_heads,
    num_tokens,
    num_positions,
    eps,
    INTERLEAVED: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_COLS: tl.constexpr,
    HALF_COLS: tl.constexpr,
):
    """Of all heads of q or of k, of each num_programs-th block of tokens."""
    cols = tl.arange(0, HEAD_COLS)[None, None, :]
    everywhere = tl.zeros((1, 1, 1), dtype=tl.int32) == 0
    wa, wb = _load_pairs(weight_ptr, everywhere, INTERLEAVED, HALF, 1, 1, HALF_COLS)
    w_rest = _load_rest(weight_ptr, everywhere, cols, HALF, HEAD_DIM)
    if ZERO_CENTERED:
        wa += 1.0
        wb += 1.0
        w_rest += 1.0
    dwa = tl.zeros((TOKENS, HEADS, HALF_COLS), dtype=tl.float32)
    dwb = tl.zeros((TOKENS, HEADS, HALF_COLS), dtype=tl.float32)
    if 2 * HALF < HEAD_DIM:
        dw_rest = tl.zeros((TOKENS, HEADS, HEAD_COLS), dtype=tl.float32)
    start = tl.program_id(0).to(tl.int64) * TOKENS
    for block in tl.range(start, num_tokens, tl.num_programs(0) * TOKENS):
        tokens = block + tl.arange(0, TOKENS)[:, None, None]
        # fmt: off
        cos, sin = _table_rows(
            cos_ptr, sin_ptr, position_ids_ptr, tokens, num_tokens, num_positions, HALF, HALF_COLS
        )
        # fmt: on
        for first in range(0, num_heads, HEADS):
            heads = first + tl.arange(0, HEADS)[None, :, None]
            mask = (tokens < num_tokens) & (heads < num_heads)
            src = x_ptr + tokens * x_token_stride + heads.to(tl.int64) * x_head_stride
            grad = dy_ptr + tokens * dy_token_stride + heads.to(tl.int64) * dy_head_stride
            dst = dx_ptr + (tokens * num_heads + heads) * HEAD_DIM
            a, b = _load_pairs(src, mask, INTERLEAVED, HALF, TOKENS, HEADS, HALF_COLS)
            dya, dyb = _load_pairs(grad, mask, INTERLEAVED, HALF, TOKENS, HEADS, HALF_COLS)
            squares = tl.sum(a * a + b * b, axis=2, keep_dims=True)
            if 2 * HALF < HEAD_DIM:
                rest = _load_rest(src, mask, cols, HALF, HEAD_DIM)
                squares += tl.sum(rest * rest, axis=2, keep_dims=True)
            rstd = tl.rsqrt(squares / HEAD_DIM + eps)
            a, b = a * rstd, b * rstd
            da = dya * cos + dyb * sin
            db = dyb * cos - dya * sin
            dwa += da * a
            dwb += db * b
            da, db = da * wa, db * wb
            products = tl.sum(da * a + db * b, axis=2, keep_dims=True)
            if 2 * HALF < HEAD_DIM:
                rest = rest * rstd
                d_rest = _load_rest(grad, mask, cols, HALF, HEAD_DIM)
                dw_rest += d_rest * rest
                d_rest = d_rest * w_rest
                products += tl.sum(d_rest * rest, axis=2, keep_dims=True)
            mean = products / HEAD_DIM
            _store_pairs(
                dst,
                (da - a * mean) * rstd,
                (db - b * mean) * rstd,
                mask,
                INTERLEAVED,
                HALF,
                TOKENS,
                HEADS,
                HALF_COLS,
            )
            if 2 * HALF < HEAD_DIM:
                inside = mask & (cols >= 2 * HALF) & (cols < HEAD_DIM)
                d_rest = (d_rest - rest * mean) * rstd
                tl.store(dst + cols, d_rest.to(dx_ptr.dtype.element_ty), mask=inside)
    partial = partial_dw_ptr + tl.program_id(0).to(tl.int64) * HEAD_DIM
    total_a = tl.sum(tl.sum(dwa, axis=0, keep_dims=True), axis=1, keep_dims=True)
    total_b = tl.sum(tl.sum(dwb, axis=0, keep_dims=True), axis=1, keep_dims=True)
    _store_pairs(partial, total_a, total_b, everywhere, INTERLEAVED, HALF, 1, 1, HALF_COLS)
    if 2 * HALF < HEAD_DIM:
        total_rest = tl.sum(tl.sum(dw_rest, axis=0, keep_dims=True), axis=1, keep_dims=True)
        tl.store(partial + cols, total_rest, mask=(cols >= 2 * HALF) & (cols < HEAD_DIM))


@triton.jit
def _backward_kernel(
    dq_ptr,
    dk_ptr,
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    q_out_ptr,
    k_out_ptr,
    q_partial_ptr,
    k_partial_ptr,
    dq_token_stride,
    dq_head_stride,
    dk_token_stride,
    dk_head_stride,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    num_tokens,
    num_positions,
    num_q_heads,
    num_k_heads,
    eps,
    INTERLEAVED: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HEAD_COLS: tl.constexpr,
    HALF_COLS: tl.constexpr,
):
    # fmt: off
    _backward_heads(
        dq_ptr, q_ptr, q_out_ptr, q_weight_ptr, cos_ptr, sin_ptr, position_ids_ptr, q_partial_ptr,
        dq_token_stride, dq_head_stride, q_token_stride, q_head_stride, num_q_heads, num_tokens,
        num_positions, eps, INTERLEAVED, ZERO_CENTERED, HEAD_DIM, HALF, TOKENS, Q_HEADS, HEAD_COLS,
        HALF_COLS,
    )
    _backward_heads(
        dk_ptr, k_ptr, k_out_ptr, k_weight_ptr, cos_ptr, sin_ptr, position_ids_ptr, k_partial_ptr,
        dk_token_stride, dk_head_stride, k_token_stride, k_head_stride, num_k_heads, num_tokens,
        num_positions, eps, INTERLEAVED, ZERO_CENTERED, HEAD_DIM, HALF, TOKENS, K_HEADS, HEAD_COLS,
        HALF_COLS,
    )
    # fmt: on


def _blocks(q: Tensor, k: Tensor, cos: Tensor) -> dict[str, int]:
    """The constants that say how a program's blocks look."""
    head_dim = q.shape[2]
    head_cols = next_power_of_2(head_dim)
    is_wide = head_dim > 128 or 2 * cos.shape[1] < head_dim
    elements = _BLOCK_ELEMENTS_WIDE if is_wide else _BLOCK_ELEMENTS
    most_heads = max(1, min(8, elements // head_cols))
    q_heads, k_heads = (min(most_heads, next_power_of_2(x.shape[1])) for x in (q, k))
    return {
        "HEAD_DIM": head_dim,
        "HALF": cos.shape[1],
        "TOKENS": max(1, min(elements // (q_heads * head_cols), 32)),
        "Q_HEADS": q_heads,
        "K_HEADS": k_heads,
        "HEAD_COLS": head_cols,
        "HALF_COLS": next_power_of_2(cos.shape[1]),
        "num_warps": 4,
    }


@operator("nanotron_fast::rope_normed_forward")
def forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    eps: float,
    interleaved: bool,
    zero_centered: bool,
) -> tuple[Tensor, Tensor]:
    """q and k turned, contiguous. The last dims of q and k, and all others, are contiguous."""
    outs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k)]
    if len(q):
        blocks = _blocks(q, k, cos)
        on_grid(_forward_kernel, (ceil_div(len(q), blocks["TOKENS"]),))(
            *(q, k, q_weight, k_weight, cos, sin, position_ids, *outs),
            *(q.stride(0), q.stride(1), k.stride(0), k.stride(1)),
            *(len(q), len(cos), q.shape[1], k.shape[1], eps),
            INTERLEAVED=interleaved,
            ZERO_CENTERED=zero_centered,
            **blocks,
        )
    return outs[0], outs[1]


@forward.register_fake
def _(q, k, q_weight, k_weight, cos, sin, position_ids, eps, interleaved, zero_centered):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@operator("nanotron_fast::rope_normed_backward")
def backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    eps: float,
    interleaved: bool,
    zero_centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q and k, and of both weights in fp32 (2, d), from those of the results."""
    outs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k)]
    if not len(q):
        return outs[0], outs[1], q.new_zeros(2, q.shape[2], dtype=torch.float32)
    # Twice the threads of forward: a thread holds two gradients and two sums beside the values.
    blocks = {**_blocks(q, k, cos), "num_warps": 8}
    tensors = (dq, dk, q, k, q_weight, k_weight, cos, sin, position_ids, *outs)
    numbers: list[Any] = [x.stride(dim) for x in (dq, dk, q, k) for dim in (0, 1)]
    numbers += [len(q), len(cos), q.shape[1], k.shape[1], eps]
    constants = {"INTERLEAVED": interleaved, "ZERO_CENTERED": zero_centered, **blocks}
    resident = occupancy.resident_programs(
        _backward_kernel,
        (*tensors, torch.float32, torch.float32, *numbers),
        constants,
        q.device,
    )
    num_programs = min(ceil_div(len(q), blocks["TOKENS"]), resident)
    partial = torch.empty(2, num_programs, q.shape[2], dtype=torch.float32, device=q.device)
    on_grid(_backward_kernel, (num_programs,))(*tensors, *partial, *numbers, **constants)
    return outs[0], outs[1], partial.sum(1)


@backward.register_fake
def _(dq, dk, q, k, q_weight, k_weight, cos, sin, position_ids, eps, interleaved, zero_centered):
    dw = q.new_empty(2, q.shape[2], dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), dw


class _RopeNormed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, position_ids, options):
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, position_ids)
        ctx.options = options
        return forward(q, k, q_weight, k_weight, cos, sin, position_ids, **options)

    @staticmethod
    def backward(ctx, dq, dk):
        dq, dk = (each if each.stride(-1) == 1 else each.contiguous() for each in (dq, dk))
        dq, dk, dw = backward(dq, dk, *ctx.saved_tensors, **ctx.options)
        dw_q, dw_k = (
            part.to(weight.dtype) for part, weight in zip(dw, ctx.saved_tensors[2:4], strict=True)
        )
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
        position_ids: (tokens,) int32 or int64, rows of the tables; 0, 1, 2, ... where None. On a
            GPU the token of a position outside the tables becomes NaN.
        interleaved: pairs are neighbours, not halves of the head.
        zero_centered: the weights are stored less one, as Gemma does.

    Returns:
        q (tokens, H, d) and k (tokens, K, d), contiguous, in q's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    fits = q.dim() == k.dim() == 3 and k.dtype == q.dtype
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
    if position_ids is None and len(cos) < len(q):
        raise ValueError(f"rope_normed: {len(q)} tokens, tables for {len(cos)} positions")
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
