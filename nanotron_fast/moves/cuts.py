"""Cutting a move where the file that it writes to is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from nanotron_fast.moves.move import Move
from nanotron_fast.moves.row import FILL

# Dimensions, longest stride first: (size, stride) in elements.
_Dims = Sequence[tuple[int, int]]


def can_be_cut(move: Move, multiple_bytes: int) -> bool:
    """Whether `within` can cut a move at the multiples of some bytes: between elements, and between
    rows that do not reach into each other."""
    item = move.destination_dtype.itemsize
    if move.destination_offset % item or multiple_bytes % item:
        return False
    span = 1
    for size, stride in reversed(_dims(move)[1]):
        if stride < span:
            return False
        span += (size - 1) * stride
    return True


def within(move: Move, begin_bytes: int, end_bytes: int) -> list[Move]:
    """The part of a move that writes the bytes of a file from `begin_bytes` up to `end_bytes`.

    The rest of a row, whole rows and the beginning of one are moves each, in every dimension.
    `can_be_cut` holds for the move and these bytes.
    """
    order, dims = _dims(move)
    item = move.destination_dtype.itemsize
    low, high = begin_bytes - move.destination_offset, end_bytes - move.destination_offset
    if low <= 0 and (_span(dims) * item) <= high:
        return [move]
    return [_boxed(move, order, box) for box in _boxes(dims, low // item, high // item)]


def _dims(move: Move) -> tuple[list[int], list[tuple[int, int]]]:
    """The numbers of the dimensions that are longer than one, and these."""
    strides = move.destination_strides
    order = sorted((dim for dim in range(3) if move.sizes[dim] > 1), key=lambda dim: -strides[dim])
    return order, [(move.sizes[dim], strides[dim]) for dim in order]


def _span(dims: _Dims) -> int:
    """Elements from the first to behind the last."""
    return 1 + sum((size - 1) * stride for size, stride in dims)


def _boxes(dims: _Dims, low: int, high: int) -> Iterator[list[tuple[int, int]]]:
    """Boxes of what lies from element `low` up to `high`: first index and count a dimension."""
    if not dims:
        if low <= 0 < high:
            yield []
        return
    (size, stride), inner = dims[0], dims[1:]
    # The rows that begin at `low` or behind it, up to those that end behind `high`.
    first = min(max(-(-low // stride), 0), size)
    end = min(max((high - _span(inner)) // stride + 1, 0), size)
    if first > 0:
        row = first - 1
        for box in _boxes(inner, low - row * stride, high - row * stride):
            yield [(row, 1), *box]
    if first < end:
        yield [(first, end - first), *((0, count) for count, _ in inner)]
    row = max(first, end)
    if row < size:
        for box in _boxes(inner, low - row * stride, high - row * stride):
            yield [(row, 1), *box]


def _boxed(move: Move, order: Sequence[int], box: Sequence[tuple[int, int]]) -> Move:
    sizes = [1, 1, 1]
    source = destination = 0
    for dim, (first, count) in zip(order, box, strict=True):
        sizes[dim] = count
        source += first * move.source_strides[dim]
        destination += first * move.destination_strides[dim]
    if move.source == FILL:
        source = 0
    a, b, c = sizes
    return replace(
        move,
        source_offset=move.source_offset + source * move.source_dtype.itemsize,
        destination_offset=move.destination_offset + destination * move.destination_dtype.itemsize,
        sizes=(a, b, c),
    )
