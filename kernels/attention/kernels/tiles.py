"""What the attention kernels share: a program's document, loads of rows, scores.

Rows are counted from the start of a sequence or document. Scores are kept in units of log2, so that
exp2 undoes them: `scale` is scale * log2(e), or, under a softcap, 2 * log2(e) * scale / softcap,
the argument of the tanh as exp2 wants it, and `cap` is softcap * log2(e). Each kernel is given
`strides`, of batch, row and head of each tensor that it reads by them, `sizes`, `scales`, which
of the lengths it is tuned for (`size_class`), and its constants.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_block(
    cu_seqlens_ptr,
    num_documents,
    num_tokens,
    BLOCK: tl.constexpr,
    VARLEN: tl.constexpr,
    LAST_FIRST: tl.constexpr,
):
    """A program's block, and the first row, the rows and the number of its sequence.

    Documents lie one after the other, and none of their lengths is known on the host: document d
    owns the programs from cu_seqlens[d] // BLOCK + d on, which leaves it enough for its rows
    whatever they are (one may be left over, and finds its block past the end). Tokens after the
    last document count as one more, whose number is num_documents.
    """
    program = tl.program_id(0)
    if LAST_FIRST:  # under a causal mask the last rows have the most to do: they start first
        program = tl.num_programs(0) - 1 - program
    if VARLEN:
        low = tl.zeros((), tl.int32)
        high = low + num_documents
        while low < high:
            middle = (low + high + 1) // 2
            owned = tl.load(cu_seqlens_ptr + middle) // BLOCK + middle <= program
            low = tl.where(owned, middle, low)
            high = tl.where(owned, high, middle - 1)
        start = tl.load(cu_seqlens_ptr + low)
        end = tl.load(cu_seqlens_ptr + low + 1, mask=low < num_documents, other=num_tokens)
        return program - (start // BLOCK + low), start, end - start, low
    else:
        start = tl.zeros((), tl.int32)
        return program, start, num_tokens + start, start


@triton.jit
def offset_of(strides, batch, row, head):
    """Where a row of a head begins, in elements; the strides are those of batch, row and head."""
    return batch * strides[0] + head * strides[2] + row * strides[1]


@triton.jit
def load_rows(
    base_ptr,
    row_stride,
    first,
    num_rows,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(ROWS, BLOCK_D) from row `first` on; unmasked where the caller knows that all are there."""
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    pointers = base_ptr + (tl.zeros((), tl.int64) + first) * row_stride
    pointers = pointers + (rows[:, None] * row_stride + dims[None, :])
    if MASKED:
        mask = (first + rows < num_rows)[:, None] & (dims < HEAD_DIM)[None, :]
        tile = tl.load(pointers, mask=mask, other=0.0)
    elif HEAD_DIM != BLOCK_D:
        tile = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(
    base_ptr,
    row_stride,
    first,
    num_rows,
    tile,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Stores a tile where load_rows would load it, in the dtype of what is written to."""
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    pointers = base_ptr + (tl.zeros((), tl.int64) + first) * row_stride
    pointers = pointers + (rows[:, None] * row_stride + dims[None, :])
    mask = (first + rows < num_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def tanh_of(products, scale):
    """tanh of the scaled products; exp2 overflows to inf or 0 exactly where tanh is 1 or -1."""
    return 1.0 - 2.0 / (tl.exp2(products * scale) + 1.0)


@triton.jit
def is_visible(queries, keys, num_k, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The mask of two broadcastable index tensors; queries count in keys' positions."""
    if CAUSAL:  # no query stands past the last key
        visible = keys <= queries
        if HAS_WINDOW:
            visible = visible & (keys > queries - window)
    else:
        visible = keys < num_k
    return visible


@triton.jit
def key_range(
    row,
    num_q,
    num_k,
    window,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """first, inner, outer, last: what the queries of the block at `row` see.

    Keys from `first` to `last` are seen by some query, those from `inner` to `outer` by every one.
    All but `last` are multiples of BLOCK_N. The last query stands at the last key.
    """
    first = num_k * 0
    inner = first
    if CAUSAL:
        position = row + num_k - num_q
        last = tl.maximum(tl.minimum(position + BLOCK_M, num_k), 0)
        outer = tl.minimum(tl.maximum(position + 1, 0), last) // BLOCK_N * BLOCK_N
        if HAS_WINDOW:
            first = tl.maximum(position - window + 1, 0) // BLOCK_N * BLOCK_N
            inner = tl.cdiv(tl.maximum(position + BLOCK_M - window, 0), BLOCK_N)
            inner = tl.minimum(inner, tl.cdiv(last, BLOCK_N)) * BLOCK_N
            outer = tl.maximum(inner, outer)
    else:
        last = num_k
        outer = last // BLOCK_N * BLOCK_N
    return first, inner, outer, last


@triton.jit
def query_range(
    row,
    num_q,
    num_k,
    window,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """first, inner, outer, last: which queries see the keys of the block at `row`.

    Queries from `first` to `last` see some of them, those from `inner` to `outer` all of them.
    All but `last` are multiples of BLOCK_M; without a window `outer` is `last`, since neither
    queries nor keys past the end need a mask: the ones are zeros, the others are never stored.
    """
    first = num_q * 0
    inner = first
    outer = num_q
    last = num_q
    if CAUSAL:
        position = row + num_q - num_k
        first = tl.maximum(position, 0) // BLOCK_M * BLOCK_M
        inner = tl.cdiv(tl.maximum(position + BLOCK_N - 1, 0), BLOCK_M)
        if HAS_WINDOW:
            last = tl.minimum(tl.maximum(position + BLOCK_N - 1 + window, 0), num_q)
            outer = tl.minimum(tl.maximum(position + window, 0), num_q) // BLOCK_M * BLOCK_M
        inner = tl.minimum(inner, tl.cdiv(last, BLOCK_M)) * BLOCK_M
        outer = tl.maximum(inner, outer)
    return first, inner, outer, last
