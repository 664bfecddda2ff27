"""The kernels under `rope_normed`.

A program of forward takes a few tokens and a group of heads of q or of k; its neighbours take the
other groups of the same tokens, whose cosines and sines come from a cache then. Blocks are (tokens,
heads, columns): one for each member of the pairs, and one for what does not turn. A program of
backward walks over blocks of tokens, and in each over the heads of q, then of k: it sums its share
of the gradients of the weights. Strides are pairs: from token to token, and from head to head.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    side,
    first,
    tokens,
    num_tokens,
    cos,
    sin,
    eps,
    INTERLEAVED: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_COLS: tl.constexpr,
    HALF_COLS: tl.constexpr,
):
    """Of a group of heads, from `first`, of q or of k; `side` is what is its own of each."""
    x_ptr, y_ptr, weight_ptr, x_strides, num_heads = side
    cols = tl.arange(0, HEAD_COLS)[None, None, :]
    everywhere = tl.zeros((1, 1, 1), dtype=tl.int32) == 0
    wa, wb = _load_pairs(weight_ptr, everywhere, INTERLEAVED, HALF, 1, 1, HALF_COLS)
    if ZERO_CENTERED:
        wa += 1.0
        wb += 1.0
    heads = first + tl.arange(0, HEADS)[None, :, None]
    mask = (tokens < num_tokens) & (heads < num_heads)
    src = x_ptr + tokens * (x_strides[0] * STRIDE_UNIT)
    src += heads.to(tl.int64) * (x_strides[1] * STRIDE_UNIT)
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
def forward_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    q_out_ptr,
    k_out_ptr,
    strides,
    sizes,
    eps,
    INTERLEAVED: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HEAD_COLS: tl.constexpr,
    HALF_COLS: tl.constexpr,
):
    q_strides, k_strides = strides
    num_tokens, num_positions, num_q_heads, num_k_heads = sizes
    num_q_groups = tl.cdiv(num_q_heads, Q_HEADS)
    num_groups = num_q_groups + tl.cdiv(num_k_heads, K_HEADS)
    group = tl.program_id(0) % num_groups
    first_token = (tl.program_id(0) // num_groups).to(tl.int64) * TOKENS
    tokens = first_token + tl.arange(0, TOKENS)[:, None, None]
    # fmt: off
    cos, sin = _table_rows(
        cos_ptr, sin_ptr, position_ids_ptr, tokens, num_tokens, num_positions, HALF, HALF_COLS
    )
    q_side = (q_ptr, q_out_ptr, q_weight_ptr, q_strides, num_q_heads)
    k_side = (k_ptr, k_out_ptr, k_weight_ptr, k_strides, num_k_heads)
    if group < num_q_groups:
        _forward_heads(
            q_side, group * Q_HEADS, tokens, num_tokens, cos, sin, eps, INTERLEAVED, ZERO_CENTERED,
            STRIDE_UNIT, HEAD_DIM, HALF, TOKENS, Q_HEADS, HEAD_COLS, HALF_COLS,
        )
    else:
        _forward_heads(
            k_side, (group - num_q_groups) * K_HEADS, tokens, num_tokens, cos, sin, eps,
            INTERLEAVED, ZERO_CENTERED, STRIDE_UNIT, HEAD_DIM, HALF, TOKENS, K_HEADS, HEAD_COLS,
            HALF_COLS,
        )
    # fmt: on


@triton.jit
def _backward_heads(
    side,
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    num_tokens,
    num_positions,
    eps,
    INTERLEAVED: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_COLS: tl.constexpr,
    HALF_COLS: tl.constexpr,
):
    """As _forward_heads(), of each num_programs-th block of tokens."""
    dy_ptr, x_ptr, dx_ptr, weight_ptr, partial_dw_ptr, dy_strides, x_strides, num_heads = side
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
            src = x_ptr + tokens * (x_strides[0] * STRIDE_UNIT)
            src += heads.to(tl.int64) * (x_strides[1] * STRIDE_UNIT)
            grad = dy_ptr + tokens * (dy_strides[0] * STRIDE_UNIT)
            grad += heads.to(tl.int64) * (dy_strides[1] * STRIDE_UNIT)
            dst = dx_ptr + tokens * (num_heads * HEAD_DIM) + heads * HEAD_DIM
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
def backward_kernel(
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
    strides,
    sizes,
    eps,
    INTERLEAVED: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HEAD_COLS: tl.constexpr,
    HALF_COLS: tl.constexpr,
):
    dq_strides, dk_strides, q_strides, k_strides = strides
    num_tokens, num_positions, num_q_heads, num_k_heads = sizes
    sides = (
        (dq_ptr, q_ptr, q_out_ptr, q_weight_ptr, q_partial_ptr, dq_strides, q_strides, num_q_heads),
        (dk_ptr, k_ptr, k_out_ptr, k_weight_ptr, k_partial_ptr, dk_strides, k_strides, num_k_heads),
    )
    for side in tl.static_range(2):
        _backward_heads(
            sides[side], cos_ptr, sin_ptr, position_ids_ptr, num_tokens, num_positions, eps,
            INTERLEAVED, ZERO_CENTERED, STRIDE_UNIT, HEAD_DIM, HALF, TOKENS,
            Q_HEADS if side == 0 else K_HEADS, HEAD_COLS, HALF_COLS,
        )  # fmt: skip
