"""Proving that strided boxes fill a file: every byte once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanotron_fast.errors import PlanError


@dataclass(frozen=True, slots=True)
class Extent:
    """The bytes that a move writes: (count, stride) per dimension, outermost first."""

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


def extent_of(offset: int, item: int, sizes: Sequence[int], strides: Sequence[int]) -> Extent:
    """The bytes that a box takes; offset and item in bytes, strides in elements."""
    dims = sorted(
        ((size, stride * item) for size, stride in zip(sizes, strides, strict=True) if size > 1),
        key=lambda dim: -dim[1],
    )
    merged: list[tuple[int, int]] = []
    for size, stride in dims:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return Extent(offset, item, tuple(merged))


def cover(path: str, extents: list[Extent], start: int, end: int) -> list[Extent]:
    """Proves that extents, in order of offset, fill [start, end) without gap or overlap.

    Returns those that begin at or behind `end`. Extents whose rows interleave share an outermost
    stride: within one stride, their first rows must fill it, and so do all the others then.
    """
    position = start
    index = 0
    while position < end:
        if index == len(extents) or extents[index].offset > position:
            raise PlanError(f"{path}: nothing writes byte {position}")
        first = extents[index]
        if first.offset < position:
            raise PlanError(f"{path}: byte {first.offset} is written twice")
        dense = first.dense_bytes
        if dense is not None:
            position += dense
            index += 1
            continue
        count, stride = first.dims[0]
        rows: list[Extent] = []
        while index < len(extents) and extents[index].offset < first.offset + stride:
            extent = extents[index]
            if not extent.dims or extent.dims[0] != (count, stride):
                raise PlanError(f"{path}: moves overlap at byte {extent.offset}")
            rows.append(Extent(extent.offset, extent.item, extent.dims[1:]))
            index += 1
        if cover(path, rows, position, position + stride):
            raise PlanError(f"{path}: moves overlap at byte {position + stride}")
        position += count * stride
    if position > end:
        raise PlanError(f"{path}: a move writes past byte {end}, to {position}")
    return extents[index:]
