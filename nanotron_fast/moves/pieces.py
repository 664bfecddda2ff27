"""Pieces of tensors, and the move of what two pieces of one tensor have in common."""

from __future__ import annotations

from typing import NamedTuple

from nanotron_fast.moves.boxes import Box
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.move import Move
from nanotron_fast.moves.row import FILL


class Piece(NamedTuple):
    """The share of a part that one file holds: a box of it, and where its first element lies.

    The box has the elements from index `low` up to `high`, which is not in it; `strides` are those
    of the file, in elements.
    """

    file: int
    offset_bytes: int
    dtype: Dtype
    low: Box
    high: Box
    strides: Box


def common_box(one: Piece, other: Piece) -> tuple[Box, Box] | None:
    """The box that two pieces of one tensor share, as its `low` and `high`; None without one."""
    low = (
        max(one.low[0], other.low[0]),
        max(one.low[1], other.low[1]),
        max(one.low[2], other.low[2]),
    )
    high = (
        min(one.high[0], other.high[0]),
        min(one.high[1], other.high[1]),
        min(one.high[2], other.high[2]),
    )
    if low[0] >= high[0] or low[1] >= high[1] or low[2] >= high[2]:
        return None
    return low, high


def intersect(source: Piece, destination: Piece) -> Move | None:
    """The move of what two pieces of one tensor share, or None."""
    box = common_box(source, destination)
    if box is None:
        return None
    low, high = box
    return Move(
        source=source.file,
        source_offset=_offset(source, low),
        destination=destination.file,
        destination_offset=_offset(destination, low),
        sizes=(high[0] - low[0], high[1] - low[1], high[2] - low[2]),
        source_strides=source.strides,
        destination_strides=destination.strides,
        source_dtype=source.dtype,
        destination_dtype=destination.dtype,
    )


def _offset(piece: Piece, low: Box) -> int:
    (a, b, c), (i, j, k), (x, y, z) = low, piece.low, piece.strides
    elements = (a - i) * x + (b - j) * y + (c - k) * z
    return piece.offset_bytes + elements * piece.dtype.itemsize


def fill_behind(piece: Piece, end: int) -> Move | None:
    """A fill of the rows of a piece from row `end` of the tensor on, or None without such rows."""
    if piece.high[0] <= end:
        return None
    low = (max(piece.low[0], end), piece.low[1], piece.low[2])
    sizes = (piece.high[0] - low[0], piece.high[1] - low[1], piece.high[2] - low[2])
    return Move(
        source=FILL,
        source_offset=0,
        destination=piece.file,
        destination_offset=_offset(piece, low),
        sizes=sizes,
        source_strides=(0, 0, 0),
        destination_strides=piece.strides,
        source_dtype=piece.dtype,
        destination_dtype=piece.dtype,
    )
