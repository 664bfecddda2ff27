"""The Triton kernels of the vocabulary-parallel cross entropy; its formulas are in `cross_entropy`.

A row is read and written as vectors of 16 bytes at addresses that are multiples of that, whatever
the vocabulary. Where rows do not begin or end at such an address (50257 columns) a row has edges,
fewer elements than a vector at either end, which one access of single elements takes.
Shapes: logits (rows, vocab/ranks); target, loss, z (rows,); statistics (3, rows) of a rank,
(ranks, 3, rows) of all; M and s, `maximum_and_sum`, (2, rows).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _vectors(row, row_stride, end, HAS_EDGES: tl.constexpr, VECTOR: tl.constexpr):
    """Of a row's first `end` columns: the vectors.

    Where they begin, in elements from the tensor's start; their first column; how many they are.
    """
    if HAS_EDGES:
        start = row * row_stride
        # The compiler has to see that it is a multiple.
        aligned = (start + VECTOR - 1) // VECTOR * VECTOR
        first_col = (aligned - start).to(tl.int32)
    else:
        aligned = row * (row_stride // VECTOR) * VECTOR
        first_col = 0
    return aligned, first_col, tl.maximum(end - first_col, 0) // VECTOR


@triton.jit
def _edges(first_col, num_vectors, end, VECTOR: tl.constexpr):
    """The columns on either side of a row's vectors, and which of them are there."""
    edge = tl.arange(0, 2 * VECTOR)
    is_before = edge < VECTOR
    cols = tl.where(is_before, edge, first_col + (num_vectors - 1) * VECTOR + edge)
    return cols, cols < tl.where(is_before, tl.minimum(first_col, end), end)


@triton.jit
def statistics_kernel(
    logits_ptr,
    target_ptr,
    statistics_ptr,
    row_stride,
    num_rows,
    num_cols,
    first_col,
    ignore_index,
    HAS_IGNORE: tl.constexpr,
    HAS_EDGES: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row).to(tl.int64)
    end = num_cols
    if HAS_IGNORE:
        end = tl.where(target == ignore_index, 0, num_cols)
    # A lane is one load of 16 bytes, and keeps a maximum and a sum of its own: nothing passes
    # between threads before the row is read.
    aligned, vector_col, num_vectors = _vectors(row, row_stride, end, HAS_EDGES, VECTOR)
    maxima = tl.full((LANES,), float("-inf"), dtype=tl.float32)
    sums = tl.zeros((LANES,), dtype=tl.float32)
    for start in tl.range(0, num_vectors, LANES):
        vectors = start + tl.arange(0, LANES)[:, None]
        logits = tl.load(
            logits_ptr + aligned + vectors * VECTOR + tl.arange(0, VECTOR)[None, :],
            mask=vectors < num_vectors,
            other=float("-inf"),
        ).to(tl.float32)
        larger = tl.maximum(maxima, tl.max(logits, axis=1))
        # As long as a lane saw -inf alone, -inf - -inf would be NaN.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        sums = sums * tl.exp(maxima - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        maxima = larger
    maximum = tl.max(maxima, axis=0)
    if HAS_EDGES:
        cols, is_there = _edges(vector_col, num_vectors, end, VECTOR)
        edges = tl.load(
            logits_ptr + row * row_stride + cols, mask=is_there, other=float("-inf")
        ).to(tl.float32)
        maximum = tl.maximum(maximum, tl.max(edges, axis=0))
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(sums * tl.exp(maxima - shift), axis=0)
    if HAS_EDGES:
        total += tl.sum(tl.exp(edges - shift), axis=0)
    col = target - first_col
    here = (col >= 0) & (col < num_cols)
    if HAS_IGNORE:
        is_ignored = target == ignore_index
        here = here & (target != ignore_index)
        maximum = tl.where(is_ignored, 0.0, maximum)
        total = tl.where(is_ignored, 1.0, total)
    picked = tl.load(logits_ptr + row * row_stride + col, mask=here, other=0.0).to(tl.float32)
    tl.store(statistics_ptr + row, maximum)
    tl.store(statistics_ptr + num_rows + row, total)
    tl.store(statistics_ptr + 2 * num_rows + row, picked)


@triton.jit
def combine_kernel(
    statistics_ptr,
    target_ptr,
    loss_ptr,
    z_ptr,
    maximum_and_sum_ptr,
    num_rows,
    num_ranks,
    shard_cols,
    ignore_index,
    z_loss,
    HAS_IGNORE: tl.constexpr,
    HAS_Z: tl.constexpr,
    ADD_MAXIMUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    target = tl.load(target_ptr + rows, mask=mask, other=0).to(tl.int64)
    maximum = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    for rank in range(num_ranks):
        theirs = tl.load(statistics_ptr + rank * 3 * num_rows + rows, mask=mask, other=0.0)
        maximum = tl.maximum(maximum, theirs)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for rank in range(num_ranks):
        theirs = tl.load(statistics_ptr + rank * 3 * num_rows + rows, mask=mask, other=0.0)
        sums = tl.load(statistics_ptr + (rank * 3 + 1) * num_rows + rows, mask=mask, other=1.0)
        total += sums * tl.exp(theirs - maximum)
    owner = target // shard_cols
    inside = mask & (target >= 0) & (owner < num_ranks)
    picked = tl.load(statistics_ptr + (owner * 3 + 2) * num_rows + rows, mask=inside, other=0.0)
    if HAS_IGNORE:
        is_ignored = target == ignore_index
        inside = inside & (target != ignore_index)
        total = tl.where(is_ignored, 1.0, total)
    log_sum = tl.log(total)
    loss = log_sum - tl.where(inside, picked - maximum, 0.0)
    if HAS_Z:
        log_z = log_sum + maximum if ADD_MAXIMUM else log_sum
        z = z_loss * log_z * log_z
        loss += z
        tl.store(z_ptr + rows, z, mask=mask)
    tl.store(loss_ptr + rows, loss, mask=mask)
    tl.store(maximum_and_sum_ptr + rows, maximum, mask=mask)
    tl.store(maximum_and_sum_ptr + num_rows + rows, total, mask=mask)


@triton.jit
def _gradient_of(logits, maximum, scale, is_target, dloss):
    gradient = tl.exp(logits - maximum) * scale
    return tl.where(is_target, gradient - dloss, gradient)


@triton.jit
def gradient_kernel(
    logits_ptr,
    target_ptr,
    maximum_and_sum_ptr,
    dloss_ptr,
    gradient_ptr,
    logits_row_stride,
    gradient_row_stride,
    num_rows,
    num_cols,
    num_blocks,
    first_col,
    ignore_index,
    z_loss,
    HAS_IGNORE: tl.constexpr,
    HAS_Z: tl.constexpr,
    ADD_MAXIMUM: tl.constexpr,
    HAS_EDGES: tl.constexpr,
    STRIDES_AGREE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Neighbouring programs share a row. gradient_ptr may be logits_ptr: each element is written by
    # one thread of one program, which has read it before.
    program = tl.program_id(0)
    row = (program // num_blocks).to(tl.int64)
    block = program % num_blocks
    target = tl.load(target_ptr + row).to(tl.int64)
    maximum = tl.load(maximum_and_sum_ptr + row)
    total = tl.load(maximum_and_sum_ptr + num_rows + row)
    dloss = tl.load(dloss_ptr + row)
    end = num_cols
    if HAS_IGNORE:
        # Nothing is read of an ignored row, which may hold what is not finite.
        end = tl.where(target == ignore_index, 0, num_cols)
        dloss = tl.where(target == ignore_index, 0.0, dloss)
    scale = dloss / total
    if HAS_Z:
        log_z = tl.log(total) + maximum if ADD_MAXIMUM else tl.log(total)
        scale *= 1.0 + 2.0 * z_loss * log_z
    dtype = gradient_ptr.dtype.element_ty
    aligned, vector_col, num_vectors = _vectors(row, logits_row_stride, num_cols, HAS_EDGES, VECTOR)
    # Offsets within the vectors of a row; that of a column is greater by vector_col.
    at = block * BLOCK + tl.arange(0, BLOCK)
    mask = at // VECTOR < num_vectors
    is_read = at // VECTOR < tl.minimum(num_vectors, end)
    logits = tl.load(logits_ptr + aligned + at, mask=is_read, other=float("-inf"))
    gradient = _gradient_of(
        logits.to(tl.float32), maximum, scale, at + vector_col == target - first_col, dloss
    )
    gradient_at = aligned if STRIDES_AGREE else row * gradient_row_stride + vector_col
    tl.store(gradient_ptr + gradient_at + at, gradient.to(dtype), mask=mask)
    if HAS_EDGES and block == 0:
        cols, is_there = _edges(vector_col, num_vectors, num_cols, VECTOR)
        edge_logits = tl.load(
            logits_ptr + row * logits_row_stride + cols,
            mask=is_there & (cols < end),
            other=float("-inf"),
        )
        edges = _gradient_of(
            edge_logits.to(tl.float32), maximum, scale, cols == target - first_col, dloss
        )
        tl.store(gradient_ptr + row * gradient_row_stride + cols, edges.to(dtype), mask=is_there)
