"""The first backward kernel of attention: dq, and delta = rowsum(dout * out) for the second.

One program for a block of queries of one head, which walks over the keys that they see as the
forward does. FLOPs: 6 * d for each visible pair. Bytes: q, out, dout and dq once, k and v once for
each block of queries, which the L2 cache serves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nanotron_fast.kernels.attention.configs import DQ, DQ_DOCUMENTS, DQ_OPTIONS, tuned
from nanotron_fast.kernels.attention.kernels.tiles import (
    find_block,
    is_visible,
    key_range,
    load_rows,
    store_rows,
    tanh_of,
)


@triton.jit
def _visit_keys(
    dq,
    q,
    dout,
    lse,
    delta,
    k_source,
    v_source,
    k_row_stride,
    v_row_stride,
    queries,
    first,
    last,
    num_k,
    window,
    scale,
    cap,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """Adds to dq (rows, d), but for the factor `scale`, what comes from keys `first` to `last`."""
    for start in tl.range(first, last, BLOCK_N):
        if TMA:
            k = k_source.load([start, 0])
            v = v_source.load([start, 0])
        else:
            k = load_rows(k_source, k_row_stride, start, num_k, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
            v = load_rows(v_source, v_row_stride, start, num_k, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if HAS_SOFTCAP:
            capped = tanh_of(scores, scale)
            weights = tl.exp2(capped * cap - lse[:, None])
        else:
            weights = tl.exp2(scores * scale - lse[:, None])
        if MASKED:
            keys = start + tl.arange(0, BLOCK_N)[None, :]
            visible = is_visible(queries[:, None], keys, num_k, window, CAUSAL, HAS_WINDOW)
            weights = tl.where(visible, weights, 0.0)
        if HAS_SOFTCAP:
            weights *= 1.0 - capped * capped
        dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.autotune(**tuned(DQ, DQ_DOCUMENTS, DQ_OPTIONS))
@triton.jit(do_not_specialize=["size_class"])
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    log2_lse_ptr,
    delta_ptr,
    dq_ptr,
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
    out_batch_stride,
    out_row_stride,
    out_head_stride,
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
    block, start, num_q, document = find_block(
        cu_seqlens_ptr, num_documents, seq_q, BLOCK_M, VARLEN, CAUSAL
    )
    row = block * BLOCK_M
    if row >= num_q:
        return
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    num_k = tl.where(document < num_documents, num_q, 0) if VARLEN else seq_k
    first_row = start.to(tl.int64)
    kv_head = head // group
    num_heads = tl.num_programs(1)
    q_ptr += batch * q_batch_stride + head * q_head_stride + first_row * q_row_stride
    k_ptr += batch * k_batch_stride + kv_head * k_head_stride + first_row * k_row_stride
    v_ptr += batch * v_batch_stride + kv_head * v_head_stride + first_row * v_row_stride
    out_ptr += batch * out_batch_stride + head * out_head_stride + first_row * out_row_stride
    dout_ptr += batch * dout_batch_stride + head * dout_head_stride + first_row * dout_row_stride
    lse_ptr += (batch * num_heads + head) * seq_q + first_row
    log2_lse_ptr += (batch * num_heads + head) * (seq_q + 1) + first_row
    delta_ptr += (batch * num_heads + head) * (seq_q + 1) + first_row
    rows = row + tl.arange(0, BLOCK_M)
    queries = rows + (num_k - num_q)  # the last query stands at the last key
    first, inner, outer, last = key_range(
        row, num_q, num_k, window, BLOCK_M, BLOCK_N, CAUSAL, HAS_WINDOW
    )

    dout = load_rows(dout_ptr, dout_row_stride, row, num_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    out = load_rows(out_ptr, out_row_stride, row, num_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + rows, delta, mask=rows < num_q)
    q = load_rows(q_ptr, q_row_stride, row, num_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    lse = tl.load(lse_ptr + rows, mask=rows < num_q, other=float("inf"))
    # Rows that see nothing, whose lse is -inf or (flash-attn) inf, have weights of 0.
    lse = tl.where(lse == float("-inf"), float("inf"), lse) * 1.4426950408889634
    tl.store(log2_lse_ptr + rows, lse, mask=rows < num_q)
    # Each head has an extra row, which the second kernel reads past the end: its weights are 0.
    tl.store(log2_lse_ptr + seq_q - first_row, float("inf"))
    tl.store(delta_ptr + seq_q - first_row, 0.0)
    if TMA:
        num_rows = tl.maximum(num_k, 1)
        k_source = tl.make_tensor_descriptor(
            k_ptr, [num_rows, HEAD_DIM], [k_row_stride, 1], [BLOCK_N, BLOCK_D]
        )
        v_source = tl.make_tensor_descriptor(
            v_ptr, [num_rows, HEAD_DIM], [v_row_stride, 1], [BLOCK_N, BLOCK_D]
        )
    else:
        k_source = k_ptr
        v_source = v_ptr
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if HAS_WINDOW:
        dq = _visit_keys(
            dq, q, dout, lse, delta, k_source, v_source, k_row_stride, v_row_stride, queries,
            first, inner, num_k, window, scale, cap, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, True,
            HEAD_DIM, BLOCK_D, BLOCK_N, TMA,
        )  # fmt: skip
    dq = _visit_keys(
        dq, q, dout, lse, delta, k_source, v_source, k_row_stride, v_row_stride, queries,
        inner, outer, num_k, window, scale, cap, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, False,
        HEAD_DIM, BLOCK_D, BLOCK_N, TMA,
    )  # fmt: skip
    dq = _visit_keys(
        dq, q, dout, lse, delta, k_source, v_source, k_row_stride, v_row_stride, queries,
        outer, last, num_k, window, scale, cap, CAUSAL, HAS_WINDOW, HAS_SOFTCAP, True,
        HEAD_DIM, BLOCK_D, BLOCK_N, TMA,
    )  # fmt: skip
    dq_row_stride = num_heads * HEAD_DIM
    dq_ptr += (batch * seq_q + first_row) * dq_row_stride + head * HEAD_DIM
    store_rows(dq_ptr, dq_row_stride, row, num_q, dq * out_scale, BLOCK_M, HEAD_DIM, BLOCK_D)
