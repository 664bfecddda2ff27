"""The forward kernel of attention: one program for a block of queries of one head.

It walks over the blocks of keys that its queries see, with a running maximum and sum (Dao, 2023).
Only blocks at the edges of what is visible are masked; blocks beyond are not visited. FLOPs:
4 * d for each visible pair of a query and a key. Bytes: q and out once, k and v once for each
block of queries, which the L2 cache serves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nanotron_fast.kernels.attention.configs import (
    FORWARD,
    FORWARD_DOCUMENTS,
    FORWARD_OPTIONS,
    tuned,
)
from nanotron_fast.kernels.attention.kernels.tiles import (
    find_block,
    is_visible,
    key_range,
    load_rows,
    offset_of,
    store_rows,
    tanh_of,
)


@triton.autotune(**tuned(FORWARD, FORWARD_DOCUMENTS, FORWARD_OPTIONS))
@triton.jit(do_not_specialize=["size_class"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
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
    q_strides, k_strides, v_strides = strides
    seq_q, seq_k, num_documents, group, window = sizes
    scale, cap = scales
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
    q_ptr += offset_of(q_strides, batch, first_row, head)
    k_ptr += offset_of(k_strides, batch, first_row, kv_head)
    v_ptr += offset_of(v_strides, batch, first_row, kv_head)
    if TMA:
        num_rows = tl.maximum(num_k, 1)
        k_source = tl.make_tensor_descriptor(
            k_ptr, [num_rows, HEAD_DIM], [k_strides[1], 1], [BLOCK_N, BLOCK_D]
        )
        v_source = tl.make_tensor_descriptor(
            v_ptr, [num_rows, HEAD_DIM], [v_strides[1], 1], [BLOCK_N, BLOCK_D]
        )
    rows = row + tl.arange(0, BLOCK_M)
    queries = rows + (num_k - num_q)  # the last query stands at the last key
    bounds = key_range(row, num_q, num_k, window, BLOCK_M, BLOCK_N, CAUSAL, HAS_WINDOW)

    q = load_rows(q_ptr, q_strides[1], row, num_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    # Blocks at the first edge, in phase 1 those that need no mask, and blocks at the last edge.
    for phase in tl.static_range(0 if HAS_WINDOW else 1, 3):
        for first in tl.range(bounds[phase], bounds[phase + 1], BLOCK_N):
            if TMA:
                k = k_source.load([first, 0])
            else:
                k = load_rows(
                    k_ptr, k_strides[1], first, num_k, BLOCK_N, HEAD_DIM, BLOCK_D, phase != 1
                )
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if HAS_SOFTCAP:
                scores = tanh_of(scores, scale)
                unit = cap
            else:
                unit = scale
            if phase != 1:
                keys = first + tl.arange(0, BLOCK_N)[None, :]
                visible = is_visible(queries[:, None], keys, num_k, window, CAUSAL, HAS_WINDOW)
                scores = tl.where(visible, scores, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1) * unit)
            # A row that has seen nothing yet must not subtract -inf.
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if phase != 1 else new_peak
            weights = tl.exp2(scores * unit - base[:, None])
            shrink = tl.exp2(peak - base)
            total = total * shrink + tl.sum(weights, 1)
            acc = acc * shrink[:, None]
            if TMA:
                v = v_source.load([first, 0])
            else:
                v = load_rows(
                    v_ptr, v_strides[1], first, num_k, BLOCK_N, HEAD_DIM, BLOCK_D, phase != 1
                )
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
            peak = new_peak

    total = tl.where(total == 0.0, 1.0, total)  # a row that saw nothing: 0, and a lse of -inf
    out = acc / total[:, None]
    lse = (peak + tl.log2(total)) * 0.6931471805599453
    num_heads = tl.num_programs(1)
    out_row_stride = num_heads * HEAD_DIM
    out_ptr += (batch * seq_q + first_row) * out_row_stride + head * HEAD_DIM
    store_rows(out_ptr, out_row_stride, row, num_q, out, BLOCK_M, HEAD_DIM, BLOCK_D)
    lse_ptr += (batch * num_heads + head) * seq_q + first_row
    tl.store(lse_ptr + rows, lse, mask=rows < num_q)
