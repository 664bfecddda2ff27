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
    offset_of,
    store_rows,
    tanh_of,
)


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
    strides,
    sizes,
    scales,
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
    q_strides, k_strides, v_strides, out_strides, dout_strides = strides
    seq_q, seq_k, num_documents, group, window = sizes
    scale, cap, out_scale = scales
    block, start, num_q, document = find_block(
        cu_seqlens_ptr, num_documents, seq_q, BLOCK_M, VARLEN, CAUSAL
    )
    row = block * BLOCK_M
    if row >= num_q:
        return
    head = tl.program_id(1)
    kv_head = (head // group).to(tl.int64)
    head = head.to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    num_k = tl.where(document < num_documents, num_q, 0) if VARLEN else seq_k
    first_row = start.to(tl.int64)
    num_heads = tl.num_programs(1)
    q_ptr += offset_of(q_strides, batch, first_row, head)
    k_ptr += offset_of(k_strides, batch, first_row, kv_head)
    v_ptr += offset_of(v_strides, batch, first_row, kv_head)
    out_ptr += offset_of(out_strides, batch, first_row, head)
    dout_ptr += offset_of(dout_strides, batch, first_row, head)
    lse_ptr += (batch * num_heads + head) * seq_q + first_row
    log2_lse_ptr += (batch * num_heads + head) * (seq_q + 1) + first_row
    delta_ptr += (batch * num_heads + head) * (seq_q + 1) + first_row
    rows = row + tl.arange(0, BLOCK_M)
    queries = rows + (num_k - num_q)  # the last query stands at the last key
    bounds = key_range(row, num_q, num_k, window, BLOCK_M, BLOCK_N, CAUSAL, HAS_WINDOW)

    dout = load_rows(dout_ptr, dout_strides[1], row, num_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    out = load_rows(out_ptr, out_strides[1], row, num_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + rows, delta, mask=rows < num_q)
    q = load_rows(q_ptr, q_strides[1], row, num_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
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
            k_ptr, [num_rows, HEAD_DIM], [k_strides[1], 1], [BLOCK_N, BLOCK_D]
        )
        v_source = tl.make_tensor_descriptor(
            v_ptr, [num_rows, HEAD_DIM], [v_strides[1], 1], [BLOCK_N, BLOCK_D]
        )
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Blocks at the first edge, in phase 1 those that need no mask, and blocks at the last edge.
    for phase in tl.static_range(0 if HAS_WINDOW else 1, 3):
        for first in tl.range(bounds[phase], bounds[phase + 1], BLOCK_N):
            if TMA:
                k = k_source.load([first, 0])
                v = v_source.load([first, 0])
            else:
                k = load_rows(
                    k_ptr, k_strides[1], first, num_k, BLOCK_N, HEAD_DIM, BLOCK_D, phase != 1
                )
                v = load_rows(
                    v_ptr, v_strides[1], first, num_k, BLOCK_N, HEAD_DIM, BLOCK_D, phase != 1
                )
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if HAS_SOFTCAP:
                capped = tanh_of(scores, scale)
                weights = tl.exp2(capped * cap - lse[:, None])
            else:
                weights = tl.exp2(scores * scale - lse[:, None])
            if phase != 1:
                keys = first + tl.arange(0, BLOCK_N)[None, :]
                visible = is_visible(queries[:, None], keys, num_k, window, CAUSAL, HAS_WINDOW)
                weights = tl.where(visible, weights, 0.0)
            if HAS_SOFTCAP:
                weights *= 1.0 - capped * capped
            dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")
            dscores = weights * (dweights - delta[:, None])
            dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    dq_row_stride = num_heads * HEAD_DIM
    dq_ptr += (batch * seq_q + first_row) * dq_row_stride + head * HEAD_DIM
    store_rows(dq_ptr, dq_row_stride, row, num_q, dq * out_scale, BLOCK_M, HEAD_DIM, BLOCK_D)
