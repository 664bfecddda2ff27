"""The Triton kernels of the vocabulary-parallel embedding; `embedding` says how they fit together.

Shapes: ids (tokens,); weight, dweight (rows, cols); out, dy (tokens, cols). Of the sorted tokens:
rows (tokens,), this rank's rows in ascending order with num_rows for ids of other ranks; order
(tokens,), where each stood; partial (2 * pieces, cols), sums of an id that goes on past a piece.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_kernel(
    ids_ptr,
    weight_ptr,
    out_ptr,
    num_tokens,
    num_units,
    num_rows,
    first_row,
    num_col_blocks,
    UNIT: tl.constexpr,
    TOKENS: tl.constexpr,
    COLS: tl.constexpr,
):
    num_cols = num_units * UNIT
    program = tl.program_id(0)
    tokens = (program // num_col_blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    cols = (program % num_col_blocks) * COLS + tl.arange(0, COLS)[None, :]
    is_token = tokens < num_tokens
    row = tl.load(ids_ptr + tokens, mask=is_token, other=-1).to(tl.int64) - first_row
    is_here = is_token & (row >= 0) & (row < num_rows)
    mask = cols < num_cols
    values = tl.load(
        weight_ptr + row[:, None] * num_cols + cols, mask=is_here[:, None] & mask, other=0.0
    )
    tl.store(out_ptr + tokens[:, None] * num_cols + cols, values, mask=is_token[:, None] & mask)


@triton.jit
def _write(pointers, total, mask, IS_ADDED: tl.constexpr):
    """The gradient of a row, which one program alone writes; or adds to what is there."""
    if IS_ADDED:
        total += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, total.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def sum_kernel(
    rows_ptr,
    order_ptr,
    dy_ptr,
    dweight_ptr,
    partial_ptr,
    num_tokens,
    num_units,
    num_rows,
    num_col_blocks,
    IS_ADDED: tl.constexpr,
    UNIT: tl.constexpr,
    PIECE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLS: tl.constexpr,
):
    num_cols = num_units * UNIT
    program = tl.program_id(0)
    first = program // num_col_blocks
    cols = (program % num_col_blocks) * COLS + tl.arange(0, COLS)
    mask = cols < num_cols
    row = tl.load(rows_ptr + first)
    before = tl.load(rows_ptr + first - 1, mask=first > 0, other=-1)
    # There is a program for every token. It sums from there on if its token is the first of an id,
    # or the first of a piece of the tokens.
    if (row < num_rows) & ((row != before) | (first % PIECE == 0)):
        end = tl.minimum((first // PIECE + 1) * PIECE, num_tokens)
        total = tl.zeros((COLS,), dtype=tl.float32)
        at = first
        while at < end:
            places = at + tl.arange(0, TOKENS)
            theirs = tl.load(rows_ptr + places, mask=places < end, other=-1)
            same = theirs == row
            token = tl.load(order_ptr + places, mask=same, other=0).to(tl.int64)
            dy = tl.load(
                dy_ptr + token[:, None] * num_cols + cols[None, :],
                mask=same[:, None] & mask[None, :],
                other=0.0,
            )
            total += tl.sum(dy.to(tl.float32), axis=0)
            at = tl.where(tl.sum(same.to(tl.int32), axis=0) == TOKENS, at + TOKENS, end)
        # The id goes on where the next piece begins with it.
        after = tl.load(rows_ptr + end, mask=end < num_tokens, other=-1)
        if (row == before) | (after == row):
            piece = first // PIECE * 2 + (first % PIECE != 0).to(tl.int32)
            tl.store(partial_ptr + piece.to(tl.int64) * num_cols + cols, total, mask=mask)
        else:
            _write(dweight_ptr + row.to(tl.int64) * num_cols + cols, total, mask, IS_ADDED)


@triton.jit
def join_kernel(
    rows_ptr,
    partial_ptr,
    dweight_ptr,
    num_tokens,
    num_units,
    num_rows,
    num_col_blocks,
    IS_ADDED: tl.constexpr,
    UNIT: tl.constexpr,
    PIECE: tl.constexpr,
    COLS: tl.constexpr,
):
    num_cols = num_units * UNIT
    # There is a program for every piece. It acts if the last id of its piece goes on in the next
    # one, and began in this one.
    program = tl.program_id(0)
    piece = program // num_col_blocks
    # Sums of first tokens begin at twice UNIT: without this word their loads would have a layout of
    # their own, and the total take a way through shared memory.
    cols = (program % num_col_blocks) * COLS + tl.multiple_of(tl.arange(0, COLS), UNIT)
    mask = cols < num_cols
    first = piece * PIECE
    end = first + PIECE
    row = tl.load(rows_ptr + end - 1, mask=end < num_tokens, other=num_rows)
    after = tl.load(rows_ptr + end, mask=end < num_tokens, other=-1)
    at_first = tl.load(rows_ptr + first)
    before = tl.load(rows_ptr + first - 1, mask=first > 0, other=-1)
    if (row < num_rows) & (after == row) & (before != row):
        slot = 2 * piece + (at_first != row).to(tl.int32)
        total = tl.load(partial_ptr + slot.to(tl.int64) * num_cols + cols, mask=mask, other=0.0)
        # `while after == row` would say it in fewer words, and crashes a pass of Triton 3.7.
        num_pieces = tl.cdiv(num_tokens, PIECE)
        at = piece + 1
        while at < num_pieces:
            total += tl.load(
                partial_ptr + (2 * at).to(tl.int64) * num_cols + cols, mask=mask, other=0.0
            )
            end = (at + 1) * PIECE
            after = tl.load(rows_ptr + end, mask=end < num_tokens, other=-1)
            at = tl.where(after == row, at + 1, num_pieces)
        _write(dweight_ptr + row.to(tl.int64) * num_cols + cols, total, mask, IS_ADDED)
