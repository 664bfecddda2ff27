"""The kernel under `rope`: turns and moves q, k and v, packed or apart, forward or backward.

A program takes a few tokens and a group of heads of q, of k or of v; its neighbours take the other
groups of the same tokens, whose cosines and sines come from a cache then. Blocks are (tokens,
heads, columns): with halves two blocks, one for each member of the pairs; interleaved one block,
split in registers. Sources and destinations have strides of their own, so that one kernel splits,
packs and works in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanotron_fast.kernels.runtime.launch import Prepared
from nanotron_fast.kernels.runtime.sizes import ceil_div, next_power_of_2, unit_of
from nanotron_fast.kernels.runtime.tuning import Tuned, powers_of_2, remembered


@dataclass(frozen=True)
class _Blocks(Tuned, operation="rope", heads=powers_of_2(1, 64)):
    """`elements` to a program, of up to `heads` heads of 32 tokens at most."""

    elements: int
    heads: int
    num_warps: int

    @classmethod
    def rule(cls, head_cols: int, itemsize: int) -> _Blocks:
        # 32 elements a thread, in four 16-byte loads of bf16.
        return cls(4096, 8, 4)

    def candidates(self) -> list[_Blocks]:
        return [_Blocks(*each) for each in ((2048, 8, 4), (4096, 4, 4), (4096, 8, 8), (8192, 8, 8))]


@triton.jit
def _move_heads(
    side,
    first,
    rows,
    INTERLEAVED: tl.constexpr,
    IN_PLACE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_COLS: tl.constexpr,
):
    """Takes a group of heads, from `first`, of q, k or v from src to dst.

    `side` is what is its own of each: without a src its heads become zeros. `rows` is what the
    tokens have: without cosines nothing turns.
    """
    src_ptr, dst_ptr, num_heads, src_token_stride, src_head_stride, dst_token_stride = side
    tokens, num_tokens, cos, sin = rows
    dtype = dst_ptr.dtype.element_ty
    cols = tl.arange(0, HEAD_COLS)[None, None, :]
    heads = first + tl.arange(0, HEADS)[None, :, None]
    mask = (tokens < num_tokens) & (heads < num_heads)
    dst = dst_ptr + tokens * (dst_token_stride * STRIDE_UNIT) + heads * HEAD_DIM
    if src_ptr is None:
        tl.store(dst + cols, 0.0, mask=mask & (cols < HEAD_DIM))
    else:
        src = src_ptr + tokens * (src_token_stride * STRIDE_UNIT)
        src += heads.to(tl.int64) * (src_head_stride * STRIDE_UNIT)
        # In place, this program alone touches these heads, and reads a pair before it writes.
        if cos is not None:
            HALF_COLS: tl.constexpr = cos.shape[2]
            if INTERLEAVED:
                pair_cols = tl.arange(0, 2 * HALF_COLS)[None, None, :]
                inside = mask & (pair_cols < 2 * HALF)
                pairs = tl.load(src + pair_cols, mask=inside, other=0.0).to(tl.float32)
                pairs = tl.reshape(pairs, (tokens.shape[0], HEADS, HALF_COLS, 2))
                a, b = tl.split(pairs)
                turned = tl.join(a * cos - b * sin, b * cos + a * sin)
                turned = tl.reshape(turned, inside.shape)
                tl.store(dst + pair_cols, turned.to(dtype), mask=inside)
            else:
                half_cols = tl.arange(0, HALF_COLS)[None, None, :]
                inside = mask & (half_cols < HALF)
                a = tl.load(src + half_cols, mask=inside, other=0.0).to(tl.float32)
                b = tl.load(src + HALF + half_cols, mask=inside, other=0.0).to(tl.float32)
                tl.store(dst + half_cols, (a * cos - b * sin).to(dtype), mask=inside)
                tl.store(dst + HALF + half_cols, (b * cos + a * sin).to(dtype), mask=inside)
        if not IN_PLACE and (cos is None or 2 * HALF < HEAD_DIM):
            inside = mask & (cols < HEAD_DIM)
            if cos is not None:
                inside = inside & (cols >= 2 * HALF)
            tl.store(dst + cols, tl.load(src + cols, mask=inside, other=0.0), mask=inside)


@triton.jit
def _rope_kernel(
    q_src_ptr,
    k_src_ptr,
    v_src_ptr,
    q_dst_ptr,
    k_dst_ptr,
    v_dst_ptr,
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    src_token_strides,
    src_head_strides,
    dst_token_strides,
    num_tokens,
    num_positions,
    num_q_heads,
    num_kv_heads,
    INVERSE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    IN_PLACE: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_COLS: tl.constexpr,
    HALF_COLS: tl.constexpr,
):
    num_q_groups = tl.cdiv(num_q_heads, Q_HEADS)
    num_kv_groups = tl.cdiv(num_kv_heads, KV_HEADS)
    num_groups = num_q_groups + num_kv_groups
    if not IN_PLACE and v_dst_ptr is not None:
        num_groups += num_kv_groups
    group = tl.program_id(0) % num_groups
    first_token = (tl.program_id(0) // num_groups).to(tl.int64) * TOKENS
    tokens = first_token + tl.arange(0, TOKENS)[:, None, None]
    positions = tokens
    if position_ids_ptr is not None:
        positions = tl.load(position_ids_ptr + tokens, mask=tokens < num_tokens, other=0)
        positions = positions.to(tl.int64)
    half_cols = tl.arange(0, HALF_COLS)[None, None, :]
    # A position outside the tables makes NaN, not a read outside them.
    mask = (positions >= 0) & (positions < num_positions) & (half_cols < HALF)
    cos = tl.load(cos_ptr + positions * HALF + half_cols, mask=mask, other=float("nan"))
    sin = tl.load(sin_ptr + positions * HALF + half_cols, mask=mask, other=float("nan"))
    if INVERSE:
        sin = -sin
    # fmt: off
    if group < num_q_groups:
        _move_heads(
            (q_src_ptr, q_dst_ptr, num_q_heads,
             src_token_strides[0], src_head_strides[0], dst_token_strides[0]),
            group * Q_HEADS, (tokens, num_tokens, cos, sin),
            INTERLEAVED, IN_PLACE, STRIDE_UNIT, HEAD_DIM, HALF, Q_HEADS, HEAD_COLS,
        )
    elif group < num_q_groups + num_kv_groups:
        _move_heads(
            (k_src_ptr, k_dst_ptr, num_kv_heads,
             src_token_strides[1], src_head_strides[1], dst_token_strides[1]),
            (group - num_q_groups) * KV_HEADS, (tokens, num_tokens, cos, sin),
            INTERLEAVED, IN_PLACE, STRIDE_UNIT, HEAD_DIM, HALF, KV_HEADS, HEAD_COLS,
        )
    elif not IN_PLACE and v_dst_ptr is not None:
        _move_heads(
            (v_src_ptr, v_dst_ptr, num_kv_heads,
             src_token_strides[2], src_head_strides[2], dst_token_strides[1]),
            (group - num_q_groups - num_kv_groups) * KV_HEADS, (tokens, num_tokens, None, None),
            INTERLEAVED, IN_PLACE, STRIDE_UNIT, HEAD_DIM, HALF, KV_HEADS, HEAD_COLS,
        )
    # fmt: on


@remembered
def _prepared(
    q_shape: torch.Size,
    num_kv_heads: int,
    itemsize: int,
    table_shape: torch.Size,
    sources: tuple[tuple[int, ...] | None, ...],
    destinations: tuple[int, int],
    has_v: bool,
    inverse: bool,
    interleaved: bool,
    in_place: bool,
) -> Prepared:
    """The launch for strides of q, k and v, and those of tokens in q's and k's destinations."""
    num_tokens, num_q_heads, head_dim = q_shape
    num_positions, half = table_shape
    head_cols = next_power_of_2(head_dim)
    blocks = _Blocks.chosen(head_cols=head_cols, itemsize=itemsize)
    q_heads, kv_heads = (min(blocks.heads, next_power_of_2(n)) for n in (num_q_heads, num_kv_heads))
    tokens = max(1, min(blocks.elements // (q_heads * head_cols), 32))
    of_sources = [(0, 0) if strides is None else strides[:2] for strides in sources]
    strides = [*zip(*of_sources, strict=True), destinations]
    unit = unit_of(*(stride for each in strides for stride in each))
    num_groups = ceil_div(num_q_heads, q_heads)
    num_groups += (1 + has_v) * ceil_div(num_kv_heads, kv_heads)
    return Prepared(
        (ceil_div(num_tokens, tokens) * num_groups,),
        (
            *[tuple(stride // unit for stride in each) for each in strides],
            num_tokens,
            num_positions,
            num_q_heads,
            num_kv_heads,
        ),
        INVERSE=inverse,
        INTERLEAVED=interleaved,
        IN_PLACE=in_place,
        STRIDE_UNIT=unit,
        HEAD_DIM=head_dim,
        HALF=half,
        TOKENS=tokens,
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        HEAD_COLS=head_cols,
        HALF_COLS=next_power_of_2(half),
        num_warps=blocks.num_warps,
    )


def launch(
    sources: Sequence[Tensor | None],
    destinations: Sequence[Tensor | None],
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    *,
    inverse: bool,
    interleaved: bool,
    in_place: bool = False,
) -> None:
    """Takes q, k and v from sources to destinations, all (tokens, heads, head_dim).

    Sources: any strides but the last, 1; None stands for zeros. Destinations: views of one packed
    tensor, or contiguous; None for v leaves v out. In place they are the sources, and v and what
    does not turn are left alone. cos, sin and position_ids are contiguous.
    """
    q, k, v = destinations
    prepared = _prepared(
        q.shape,
        k.shape[1],
        q.element_size(),
        cos.shape,
        tuple([None if source is None else source.stride() for source in sources]),
        (q.stride(0), k.stride(0)),
        v is not None and not in_place,
        inverse,
        interleaved,
        in_place,
    )
    prepared.launch(_rope_kernel, *sources, *destinations, cos, sin, position_ids)
