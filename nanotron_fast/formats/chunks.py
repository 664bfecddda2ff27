"""Chunks of a tensor: boxes that lie on their own, in any files, and together are all of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanotron_fast.moves.boxes import Bounds, are_disjoint

# Chunks that no straight cut parts are compared each with each.
_MAX_COMPARED = 256
# How often straight cuts may follow each other: more often than a mesh of devices has dimensions.
_MAX_DEPTH = 8


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor: `sizes` elements along each dimension, from index `low` on.

    The first of them lies at byte `begin_bytes` of the file; strides are in elements.
    """

    path: Path
    begin_bytes: int
    low: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


def filling_problem(shape: tuple[int, ...], boxes: Sequence[Bounds]) -> str | None:
    """What is wrong with chunks that should fill a tensor without an overlap; None where they do.

    None of the boxes is empty.
    """
    for box in boxes:
        if not all(
            0 <= low < high <= size
            for low, high, size in zip(box.low, box.high, shape, strict=True)
        ):
            return f"a chunk from {list(box.low)} to {list(box.high)} is not in {list(shape)}"
    held, wanted = sum(box.num_elements for box in boxes), math.prod(shape)
    if held != wanted:
        how = "some are missing" if held < wanted else "some overlap"
        return f"its chunks hold {held:,} elements, and {list(shape)} has {wanted:,}: {how}"
    if boxes and not _fill(Bounds((0,) * len(shape), shape), list(boxes), 0):
        return f"its chunks overlap, and leave out other elements of {list(shape)}"
    return None


def _fill(whole: Bounds, boxes: list[Bounds], depth: int) -> bool:
    """Whether boxes fill another, which has as many elements as they have together."""
    if len(boxes) == 1:
        return boxes[0] == whole
    if depth < _MAX_DEPTH:
        for dim in range(len(whole.low)):
            groups = _groups(boxes, dim)
            if len(groups) > 1:
                return _fill_groups(whole, groups, dim, depth)
    return len(boxes) <= _MAX_COMPARED and are_disjoint(boxes)


def _fill_groups(whole: Bounds, groups: list[list[Bounds]], dim: int, depth: int) -> bool:
    reached = whole.low[dim]
    for group in groups:
        low, high = min(box.low[dim] for box in group), max(box.high[dim] for box in group)
        part = Bounds(_with(whole.low, dim, low), _with(whole.high, dim, high))
        is_full = sum(box.num_elements for box in group) == part.num_elements
        if low != reached or not is_full or not _fill(part, group, depth + 1):
            return False
        reached = high
    return reached == whole.high[dim]


def _groups(boxes: list[Bounds], dim: int) -> list[list[Bounds]]:
    """Boxes parted wherever a straight cut across a dimension goes through none."""
    boxes.sort(key=lambda box: box.low[dim])
    groups: list[list[Bounds]] = []
    reached = -1
    for box in boxes:
        if box.low[dim] >= reached:
            groups.append([])
        groups[-1].append(box)
        reached = max(reached, box.high[dim])
    return groups


def _with(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])
