"""The second backward kernel of attention: dk and dv.

One program for a block of keys of one head, which walks over the queries that see them, of all the
query heads that share it: no atomics, so the sums are always the same. The scores are transposed
from the start, s^T = k q^T: turning the result of a product round for the next one went wrong on
Hopper in Triton 3.4 to 3.7.0. FLOPs: 8 * d for each visible pair, the scores a second time among
them. Bytes: k, v, dk, dv once, q and dout once for each block of keys, served by the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nanotron_fast.kernels.attention.configs import DKV, DKV_DOCUMENTS, DKV_OPTIONS, tuned
from nanotron_fast.kernels.attention.kernels.tiles import (
    find_block,
    is_visible,
    load_rows,
    query_range,
    store_rows,
    tanh_of,
)


@triton.jit
def _visit_queries(
    dk,
    dv,
    k,
    v,
    q_source,
    dout_source,
    lse_ptr,
    delta_ptr,
    q_row_stride,
    q_head_stride,
    dout_row_stride,
    dout_head_stride,
    keys,
    first,
    last,
    seq_q,
    first_row,
    num_q,
    shift,
    group,
    window,
    scale,
    cap,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TMA: tl.constexpr,
):
    """Adds to dk (but for the factor `scale`) and dv what comes from queries `first` to `last`.

    The pointers are those of the first of `group` query heads; one flat loop over all of them keeps
    the loads flowing from one head into the next. Everything with both queries and keys is
    (keys, queries) here.
    """
    num_blocks = tl.cdiv(tl.maximum(last - first, 0), BLOCK_M)
    head = first * 0
    start = first
    for _ in tl.range(0, num_blocks * group):
        rows = start + tl.arange(0, BLOCK_M)
        if TMA:
            q = q_source.load([start, (head * q_head_stride).to(tl.int32)])
            dout = dout_source.load([start, (head * dout_head_stride).to(tl.int32)])
        else:
            q_head = q_source + head.to(tl.int64) * q_head_stride
            q = load_rows(q_head, q_row_stride, start, num_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
            dout_head = dout_source + head.to(tl.int64) * dout_head_stride
            dout = load_rows(
                dout_head, dout_row_stride, start, num_q, BLOCK_M, HEAD_DIM, BLOCK_D, True
            )
        # Rows past the end read the extra row of each head, whose weights are 0.
        at = head * (seq_q + 1) + tl.where(rows < num_q, rows, seq_q - first_row)
        lse = tl.load(lse_ptr + at)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        if HAS_SOFTCAP:
            capped = tanh_of(scores, scale)
            weights = tl.exp2(capped * cap - lse[None, :])
        else:
            weights = tl.exp2(scores * scale - lse[None, :])
        if MASKED:
            queries = (rows + shift)[None, :]
            visible = is_visible(queries, keys[:, None], 0, window, CAUSAL, HAS_WINDOW)
            weights = tl.where(visible, weights, 0.0)
        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
        if HAS_SOFTCAP:
            weights *= 1.0 - capped * capped
        dweights = tl.dot(v, tl.trans(dout), input_precision="ieee")
        delta = tl.load(delta_ptr + at)
        dscores = weights * (dweights - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
        start += BLOCK_M
        if TMA:  # a branch takes fewer registers, but many more without the bulk copies
            if start >= last:
                head += 1
                start = first
        else:
            head = tl.where(start < last, head, head + 1)
            start = tl.where(start < last, start, first)
    return dk, dv


@triton.autotune(**tuned(DKV, DKV_DOCUMENTS, DKV_OPTIONS))
@triton.jit(do_not_specialize=["size_class"])
def dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    cu_seqlens_ptr,
    q_batch_stride,
    q_row_stride,
    q_head_stride,
    k_batch_stride,
    k_row_stride,
    k_head_stride,
    v_batch_stride,
    v_row_stride,
    v_head_stride,
    dout_batch_stride,
    dout_row_stride,
    dout_head_stride,
    seq_q,
    seq_k,
    num_documents,
    group,
    window,
    scale,
    cap,
    out_scale,
    size_class,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    VARLEN: tl.constexpr,
    CAN_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    block, start, num_k, document = find_block(
        cu_seqlens_ptr, num_documents, seq_k, BLOCK_N, VARLEN, False
    )
    row = block * BLOCK_N
    if row >= num_k:
        return
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    num_q = tl.where(document < num_documents, num_k, 0) if VARLEN else seq_q
    first_row = start.to(tl.int64)
    num_kv_heads = tl.num_programs(1)
    k_ptr += batch * k_batch_stride + kv_head * k_head_stride + first_row * k_row_stride
    v_ptr += batch * v_batch_stride + kv_head * v_head_stride + first_row * v_row_stride
    head = kv_head * group
    q_ptr += batch * q_batch_stride + head * q_head_stride + first_row * q_row_stride
    dout_ptr += batch * dout_batch_stride + head * dout_head_stride + first_row * dout_row_stride
    lse_ptr += (batch * num_kv_heads * group + head) * (seq_q + 1) + first_row
    delta_ptr += (batch * num_kv_heads * group + head) * (seq_q + 1) + first_row
    keys = row + tl.arange(0, BLOCK_N)
    shift = 0 if VARLEN else num_k - num_q  # the last query stands at the last key
    first, inner, outer, last = query_range(
        row, num_q, num_k, window, BLOCK_M, BLOCK_N, CAUSAL, HAS_WINDOW
    )
    k = load_rows(k_ptr, k_row_stride, row, num_k, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_ptr, v_row_stride, row, num_k, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    if TMA:  # whole rows, all heads of the group side by side
        q_source = tl.make_tensor_descriptor(
            q_ptr,
            [tl.maximum(num_q, 1), (group - 1) * q_head_stride + HEAD_DIM],
            [q_row_stride, 1],
            [BLOCK_M, BLOCK_D],
        )
        dout_source = tl.make_tensor_descriptor(
            dout_ptr,
            [tl.maximum(num_q, 1), (group - 1) * dout_head_stride + HEAD_DIM],
            [dout_row_stride, 1],
            [BLOCK_M, BLOCK_D],
        )
    else:
        q_source = q_ptr
        dout_source = dout_ptr
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if CAUSAL:
        dk, dv = _visit_queries(
            dk, dv, k, v, q_source, dout_source, lse_ptr, delta_ptr, q_row_stride, q_head_stride,
            dout_row_stride, dout_head_stride, keys, first, inner, seq_q, start, num_q, shift,
            group, window, scale, cap, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, True, HEAD_DIM, BLOCK_D,
            BLOCK_M, TMA,
        )  # fmt: skip
    dk, dv = _visit_queries(
        dk, dv, k, v, q_source, dout_source, lse_ptr, delta_ptr, q_row_stride, q_head_stride,
        dout_row_stride, dout_head_stride, keys, inner, outer, seq_q, start, num_q, shift,
        group, window, scale, cap, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, False, HEAD_DIM, BLOCK_D,
        BLOCK_M, TMA,
    )  # fmt: skip
    if HAS_WINDOW:
        dk, dv = _visit_queries(
            dk, dv, k, v, q_source, dout_source, lse_ptr, delta_ptr, q_row_stride, q_head_stride,
            dout_row_stride, dout_head_stride, keys, outer, last, seq_q, start, num_q, shift,
            group, window, scale, cap, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, True, HEAD_DIM, BLOCK_D,
            BLOCK_M, TMA,
        )  # fmt: skip
    row_stride = num_kv_heads * HEAD_DIM
    offset = (batch * seq_k + first_row) * row_stride + kv_head * HEAD_DIM
    store_rows(dk_ptr + offset, row_stride, row, num_k, dk * out_scale, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr + offset, row_stride, row, num_k, dv, BLOCK_N, HEAD_DIM, BLOCK_D)
