"""The kernels under `rope_normed`, and the operators around their launches.

A program takes a few tokens, loads their cosines and sines once, and walks over the heads of q,
then of k. Blocks are (tokens, heads, columns): one for each member of the pairs, and one for what
does not turn. In backward a program walks over blocks of tokens too, and sums its share of the
gradients of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanotron_fast.kernels.runtime import occupancy
from nanotron_fast.kernels.runtime.launch import on_grid
from nanotron_fast.kernels.runtime.operators import operator
from nanotron_fast.kernels.runtime.sizes import ceil_div, next_power_of_2
from nanotron_fast.kernels.runtime.tuning import Tuned


@dataclass(frozen=True)
class _ForwardBlocks(Tuned, operation="rope_normed_forward"):
    """`elements` that a program holds at a time of each tensor, of up to `heads` heads."""

    elements: int
    heads: int
    num_warps: int

    @classmethod
    def rule(cls, head_cols: int, has_rest: int, itemsize: int) -> _ForwardBlocks:
        # Fewer of wide heads, and where a part of a head does not turn, which lies in registers of
        # its own.
        return cls(1024 if head_cols > 128 or has_rest else 2048, 8, 4)

    def candidates(self) -> list[_ForwardBlocks]:
        # None with fewer than 1024: with a rest, 512 spill on sm_90.
        twice = 2 * self.elements
        shapes = ((1024, 8, 4), (self.elements, 4, 4), (self.elements, 8, 8), (twice, 8, 8))
        return [type(self)(*each) for each in shapes]


@dataclass(frozen=True)
class _BackwardBlocks(_ForwardBlocks, operation="rope_normed_backward"):
    @classmethod
    def rule(cls, head_cols: int, has_rest: int, itemsize: int) -> _BackwardBlocks:
        # Twice the threads of forward: a thread holds two gradients and two sums beside the values.
        return cls(1024 if head_cols > 128 or has_rest else 2048, 8, 8)

    def candidates(self) -> list[_BackwardBlocks]:
        shapes = ((self.elements // 2, 8, 4), (self.elements, 4, 8), (self.elements, 8, 16))
        return [_BackwardBlocks(*each) for each in shapes]


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


def _blocks(tuned: type[Tuned], q: Tensor, k: Tensor, cos: Tensor) -> dict[str, int]:
    """The constants that say how a program's blocks look."""
    head_dim = q.shape[2]
    head_cols, has_rest = next_power_of_2(head_dim), int(2 * cos.shape[1] < head_dim)
    chosen = tuned.chosen(head_cols=head_cols, has_rest=has_rest, itemsize=q.element_size())
    most_heads = max(1, min(chosen.heads, chosen.elements // head_cols))
    q_heads, k_heads = (min(most_heads, next_power_of_2(x.shape[1])) for x in (q, k))
    return {
        "HEAD_DIM": head_dim,
        "HALF": cos.shape[1],
        "TOKENS": max(1, min(chosen.elements // (q_heads * head_cols), 32)),
        "Q_HEADS": q_heads,
        "K_HEADS": k_heads,
        "HEAD_COLS": head_cols,
        "HALF_COLS": next_power_of_2(cos.shape[1]),
        "num_warps": chosen.num_warps,
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
        blocks = _blocks(_ForwardBlocks, q, k, cos)
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
    blocks = _blocks(_BackwardBlocks, q, k, cos)
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
