"""Pieces of tensors, and the move of what two pieces of one tensor have in common."""

from __future__ import annotations

from dataclasses import dataclass

from nanotron_fast.moves.boxes import Box
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.move import Move
from nanotron_fast.moves.row import FILL


@dataclass(frozen=True, slots=True)
class Piece:
    """The share of a part that one file holds: a box of it, and where its first element lies."""

    file: int
    offset_bytes: int
    dtype: Dtype
    low: Box
    high: Box
    strides: Box


def intersect(source: Piece, destination: Piece) -> Move | None:
    """The move of what two pieces of one tensor share, or None."""
    low = (
        max(source.low[0], destination.low[0]),
        max(source.low[1], destination.low[1]),
        max(source.low[2], destination.low[2]),
    )
    sizes = (
        min(source.high[0], destination.high[0]) - low[0],
        min(source.high[1], destination.high[1]) - low[1],
        min(source.high[2], destination.high[2]) - low[2],
    )
    if min(sizes) <= 0:
        return None
    return Move(
        source.file,
        _offset(source, low),
        destination.file,
        _offset(destination, low),
        sizes,
        source.strides,
        destination.strides,
        source.dtype,
        destination.dtype,
    )


def _offset(piece: Piece, low: Box) -> int:
    elements = sum(
        (index - first) * stride
        for index, first, stride in zip(low, piece.low, piece.strides, strict=True)
    )
    return piece.offset_bytes + elements * piece.dtype.itemsize


def fill_behind(piece: Piece, end: int) -> Move | None:
    """A fill of the rows of a piece from row `end` of the tensor on, or None without such rows."""
    if piece.high[0] <= end:
        return None
    low = (max(piece.low[0], end), piece.low[1], piece.low[2])
    sizes = (piece.high[0] - low[0], piece.high[1] - low[1], piece.high[2] - low[2])
    return Move(
        FILL,
        0,
        piece.file,
        _offset(piece, low),
        sizes,
        (0, 0, 0),
        piece.strides,
        piece.dtype,
        piece.dtype,
    )
