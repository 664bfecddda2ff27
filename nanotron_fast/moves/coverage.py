"""Proving that strided boxes fill a file: every byte once."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from typing import NamedTuple

from nanotron_fast.errors import PlanError


class Extent(NamedTuple):
    """The bytes that a move writes: (count, stride in bytes) a dimension, longest stride first."""

    offset: int
    item: int
    dims: tuple[tuple[int, int], ...]

    @property
    def dense_bytes(self) -> int | None:
        """Length of the one run of bytes that this is, or None."""
        if not self.dims:
            return self.item
        if len(self.dims) == 1 and self.dims[0][1] == self.item:
            return self.dims[0][0] * self.item
        return None

    @property
    def end(self) -> int:
        """The byte behind the last one."""
        return self.offset + self.item + sum((count - 1) * stride for count, stride in self.dims)


def extent_of(offset: int, item: int, sizes: Sequence[int], strides: Sequence[int]) -> Extent:
    """The bytes that a box takes; offset and item in bytes, strides in elements."""
    dims = [(size, stride * item) for size, stride in zip(sizes, strides, strict=True) if size > 1]
    if len(dims) > 1:
        dims.sort(key=_longest_first)
    merged: list[tuple[int, int]] = []
    for size, stride in dims:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return Extent(offset, item, tuple(merged))


def cover(path: str, extents: Sequence[Extent], start: int, end: int) -> list[Extent]:
    """Proves that extents, in order of offset, fill [start, end) without gap or overlap.

    Returns those that begin at or behind `end`. Raises PlanError, which names `path`.

    Extents may interleave: the rows of the first of them, `stride` bytes apart, leave room for
    others. What all of them have in the first `stride` bytes must fill these. So do then the rows
    behind, as many as every one of them has; what any has beyond those is proved after them.
    """
    left = list(extents)
    position = start
    index = 0
    while position < end:
        if index == len(left) or left[index].offset > position:
            raise PlanError(f"{path}: nothing writes byte {position}")
        first = left[index]
        if first.offset < position:
            raise PlanError(f"{path}: byte {first.offset} is written twice")
        dense = first.dense_bytes
        if dense is not None:
            position += dense
            index += 1
            continue
        stride = first.dims[0][1]
        border = position + stride
        rows: list[tuple[Extent, int]] = []
        behind: list[Extent] = []
        while index < len(left) and left[index].offset < border:
            _take_row(left[index], stride, border, rows, behind)
            index += 1
        num_rows = min(count for _, count in rows)
        for row, count in rows:
            if count > num_rows:
                dims = _dims(count - num_rows, stride, row.dims)
                behind.append(Extent(row.offset + num_rows * stride, row.item, dims))
        in_order = sorted((row for row, _ in rows), key=_by_offset)
        if cover(path, in_order, position, border):
            raise PlanError(f"{path}: moves overlap at byte {border}")
        position += num_rows * stride
        for extent in behind:
            insort(left, extent, lo=index, key=_by_offset)
    if position > end:
        raise PlanError(f"{path}: a move writes past byte {end}, to {position}")
    return left[index:]


def _longest_first(dim: tuple[int, int]) -> int:
    return -dim[1]


def _by_offset(extent: Extent) -> int:
    return extent.offset


def _take_row(
    extent: Extent,
    stride: int,
    border: int,
    rows: list[tuple[Extent, int]],
    behind: list[Extent],
) -> None:
    """Takes what an extent has before the border, in `rows` with how often that comes again.

    It comes again every `stride` bytes. Whatever else the extent has goes to `behind`.
    """
    while extent.dims and extent.dims[0][1] > stride:
        (count, step), inner = extent.dims[0], extent.dims[1:]
        behind.append(Extent(extent.offset + step, extent.item, _dims(count - 1, step, inner)))
        extent = Extent(extent.offset, extent.item, inner)
    if extent.dims and extent.dims[0][1] == stride:
        row = Extent(extent.offset, extent.item, extent.dims[1:])
        if row.end <= border:
            rows.append((row, extent.dims[0][0]))
            return
    before, rest = _split(extent, border)
    rows += [(each, 1) for each in before]
    behind += rest


def _split(extent: Extent, border: int) -> tuple[list[Extent], list[Extent]]:
    """An extent in parts that end before the border or at it, and parts that begin there or behind.

    An element that lies across the border is counted among the first.
    """
    if extent.offset >= border:
        return [], [extent]
    if extent.end <= border or not extent.dims:
        return [extent], []
    (count, step), inner = extent.dims[0], extent.dims[1:]
    row = Extent(extent.offset, extent.item, inner)
    num_whole = max(0, (border - row.end) // step + 1)
    at = extent.offset + num_whole * step
    before, rest = _split(Extent(at, extent.item, inner), border)
    if num_whole:
        before.insert(0, Extent(extent.offset, extent.item, _dims(num_whole, step, inner)))
    if num_whole + 1 < count:
        dims = _dims(count - num_whole - 1, step, inner)
        rest.append(Extent(at + step, extent.item, dims))
    return before, rest


def _dims(
    count: int, stride: int, inner: tuple[tuple[int, int], ...]
) -> tuple[tuple[int, int], ...]:
    return ((count, stride), *inner) if count > 1 else inner
