"""Pieces of tensors, and the move of what two pieces of one tensor have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from nanotron_fast.moves.boxes import Box
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.move import Move
from nanotron_fast.moves.row import FILL
from nanotron_fast.moves.scales import Code, Quantised, Scales


class Piece(NamedTuple):
    """The share of a part that one file holds: a box of it, and where its first element lies.

    The box has the elements from index `low` up to `high`, which is not in it; `strides` are those
    of the file, in elements. Of a quantised tensor, which is a source alone, `scales` say where its
    scales are, and `offset_bytes` where the element is that `first` counts from: the first element
    of a box of E2M1 may be half a byte behind that of another.
    """

    file: int
    offset_bytes: int
    dtype: Dtype | Quantised
    low: Box
    high: Box
    strides: Box
    scales: Scales | None = None
    first: int = 0


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
    """The move of what two pieces of one tensor share, or None. Neither is quantised."""
    box = common_box(source, destination)
    if box is None:
        return None
    low, high = box
    assert isinstance(source.dtype, Dtype)
    assert isinstance(destination.dtype, Dtype)
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


def moves_between(source: Piece, destination: Piece) -> Iterator[Move]:
    """The moves of what two pieces of one tensor share: none, one, or two of a source in E2M1.

    Two elements share a byte then, and each of the moves takes one of every byte.
    """
    if isinstance(source.dtype, Dtype):
        move = intersect(source, destination)
        if move is not None:
            yield move
        return
    box = common_box(source, destination)
    if box is None:
        return
    low, high = box
    assert isinstance(destination.dtype, Dtype)
    assert source.scales is not None
    elements = source.first + _elements(source, low)
    move = Move(
        source=source.file,
        source_offset=source.offset_bytes + elements,
        destination=destination.file,
        destination_offset=_offset(destination, low),
        sizes=(high[0] - low[0], high[1] - low[1], high[2] - low[2]),
        source_strides=source.strides,
        destination_strides=destination.strides,
        source_dtype=Code.E4M3,
        destination_dtype=destination.dtype,
        scales=source.scales,
    )
    if source.dtype is Quantised.E4M3:
        yield move
    else:
        yield from _halves(move, source.offset_bytes, elements)


def _halves(move: Move, begin_bytes: int, first: int) -> Iterator[Move]:
    """A move whose source strides count elements of four bits, as moves of bytes.

    `first` counts the elements from `begin_bytes` to the first of the move.
    """
    for dim in range(3):
        size, stride = move.sizes[dim], move.source_strides[dim]
        if size == 1 or stride % 2 == 0:
            continue
        # Along this dimension, every second element begins where a byte does.
        step = move.destination_strides[dim] * move.destination_dtype.itemsize
        for start in range(2):
            half = replace(
                move,
                destination_offset=move.destination_offset + start * step,
                sizes=_with(move.sizes, dim, (size - start + 1) // 2),
                source_strides=_with(move.source_strides, dim, 2 * stride),
                destination_strides=_with(
                    move.destination_strides, dim, 2 * move.destination_strides[dim]
                ),
            )
            yield from _halves(half, begin_bytes, first + start * stride)
        return
    a, b, c = move.source_strides
    yield replace(
        move,
        source_offset=begin_bytes + first // 2,
        source_strides=(a // 2, b // 2, c // 2),
        source_dtype=Code.E2M1_HIGH if first % 2 else Code.E2M1_LOW,
    )


def _with(box: Box, dim: int, value: int) -> Box:
    values = list(box)
    values[dim] = value
    a, b, c = values
    return a, b, c


def _elements(piece: Piece, low: Box) -> int:
    """From the first element of a piece to another, in elements of its file."""
    (a, b, c), (i, j, k), (x, y, z) = low, piece.low, piece.strides
    return (a - i) * x + (b - j) * y + (c - k) * z


def _offset(piece: Piece, low: Box) -> int:
    assert isinstance(piece.dtype, Dtype)
    return piece.offset_bytes + _elements(piece, low) * piece.dtype.itemsize


def fill_behind(piece: Piece, end: int) -> Move | None:
    """A fill of the rows of a piece from row `end` of the tensor on, or None without such rows."""
    if piece.high[0] <= end:
        return None
    low = (max(piece.low[0], end), piece.low[1], piece.low[2])
    sizes = (piece.high[0] - low[0], piece.high[1] - low[1], piece.high[2] - low[2])
    assert isinstance(piece.dtype, Dtype)
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
