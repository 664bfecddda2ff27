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
    offset_of,
    query_range,
    store_rows,
    tanh_of,
)


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
    q_strides, k_strides, v_strides, dout_strides = strides
    seq_q, seq_k, num_documents, group, window = sizes
    scale, cap, out_scale = scales
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
    k_ptr += offset_of(k_strides, batch, first_row, kv_head)
    v_ptr += offset_of(v_strides, batch, first_row, kv_head)
    # The first of the query heads that share these keys.
    head = kv_head * group
    q_ptr += offset_of(q_strides, batch, first_row, head)
    dout_ptr += offset_of(dout_strides, batch, first_row, head)
    lse_ptr += (batch * num_kv_heads * group + head) * (seq_q + 1) + first_row
    delta_ptr += (batch * num_kv_heads * group + head) * (seq_q + 1) + first_row
    keys = row + tl.arange(0, BLOCK_N)
    shift = 0 if VARLEN else num_k - num_q  # the last query stands at the last key
    bounds = query_range(row, num_q, num_k, window, BLOCK_M, BLOCK_N, CAUSAL, HAS_WINDOW)
    k = load_rows(k_ptr, k_strides[1], row, num_k, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_ptr, v_strides[1], row, num_k, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    if TMA:  # whole rows, all heads of the group side by side
        q_source = tl.make_tensor_descriptor(
            q_ptr,
            [tl.maximum(num_q, 1), (group - 1) * q_strides[2] + HEAD_DIM],
            [q_strides[1], 1],
            [BLOCK_M, BLOCK_D],
        )
        dout_source = tl.make_tensor_descriptor(
            dout_ptr,
            [tl.maximum(num_q, 1), (group - 1) * dout_strides[2] + HEAD_DIM],
            [dout_strides[1], 1],
            [BLOCK_M, BLOCK_D],
        )
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # Blocks at the first edge, in phase 1 those that need no mask, and blocks at the last edge.
    for phase in tl.static_range(0 if CAUSAL else 1, 3 if HAS_WINDOW else 2):
        first = bounds[phase]
        last = bounds[phase + 1]
        # One flat loop over all heads keeps the loads flowing from one into the next.
        member = first * 0
        at = first
        for _ in tl.range(0, tl.cdiv(tl.maximum(last - first, 0), BLOCK_M) * group):
            rows = at + tl.arange(0, BLOCK_M)
            if TMA:
                q = q_source.load([at, (member * q_strides[2]).to(tl.int32)])
                dout = dout_source.load([at, (member * dout_strides[2]).to(tl.int32)])
            else:
                q_head_ptr = q_ptr + member.to(tl.int64) * q_strides[2]
                q = load_rows(q_head_ptr, q_strides[1], at, num_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
                dout_head_ptr = dout_ptr + member.to(tl.int64) * dout_strides[2]
                dout = load_rows(
                    dout_head_ptr, dout_strides[1], at, num_q, BLOCK_M, HEAD_DIM, BLOCK_D, True
                )
            # Rows past the end read the extra row of each head, whose weights are 0.
            places = member * (seq_q + 1) + tl.where(rows < num_q, rows, seq_q - start)
            lse = tl.load(lse_ptr + places)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee")
            if HAS_SOFTCAP:
                capped = tanh_of(scores, scale)
                weights = tl.exp2(capped * cap - lse[None, :])
            else:
                weights = tl.exp2(scores * scale - lse[None, :])
            if phase != 1:
                queries = (rows + shift)[None, :]
                visible = is_visible(queries, keys[:, None], 0, window, CAUSAL, HAS_WINDOW)
                weights = tl.where(visible, weights, 0.0)
            dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
            if HAS_SOFTCAP:
                weights *= 1.0 - capped * capped
            dweights = tl.dot(v, tl.trans(dout), input_precision="ieee")
            delta = tl.load(delta_ptr + places)
            dscores = weights * (dweights - delta[None, :])
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
            at += BLOCK_M
            if TMA:  # a branch takes fewer registers, but many more without the bulk copies
                if at >= last:
                    member += 1
                    at = first
            else:
                member = tl.where(at < last, member, member + 1)
                at = tl.where(at < last, at, first)
    row_stride = num_kv_heads * HEAD_DIM
    offset = (batch * seq_k + first_row) * row_stride + kv_head * HEAD_DIM
    store_rows(dk_ptr + offset, row_stride, row, num_k, dk * out_scale, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr + offset, row_stride, row, num_k, dv, BLOCK_N, HEAD_DIM, BLOCK_D)
