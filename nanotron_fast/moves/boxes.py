"""Boxes of elements in a tensor: what moves copy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from nanotron_fast.errors import PlanError

Box = tuple[int, int, int]


class Bounds(NamedTuple):
    """A box: the elements from index `low` up to `high`, which is not in it, in each dimension."""

    low: tuple[int, ...]
    high: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(high - low for low, high in zip(self.low, self.high, strict=True))


@lru_cache(maxsize=1024)
def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a C-contiguous tensor."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


def boxes_of_run(shape: tuple[int, ...], first: int, end: int) -> list[Bounds]:
    """The boxes that elements `first` to `end`, without `end`, of a flattened tensor make up.

    The tensor is C-contiguous. The boxes come in the order of their elements, and there are at most
    `2 * len(shape) - 1` of them: in a matrix the end of a row, whole rows, and the beginning of a
    row. Raises PlanError for a run that is not in the tensor.
    """
    if not 0 <= first <= end <= math.prod(shape):
        raise PlanError(f"elements {first} to {end} are no run of a tensor of {list(shape)}")
    if first == end:
        return []
    if not shape:
        return [Bounds((), ())]
    inner = shape[1:]
    row_elements = math.prod(inner)
    first_row, skipped = divmod(first, row_elements)
    end_row, left = divmod(end, row_elements)
    boxes: list[Bounds] = []
    if skipped:
        stop = left if end_row == first_row else row_elements
        boxes += _in_row(first_row, boxes_of_run(inner, skipped, stop))
        first_row += 1
    if first_row < end_row:
        zeros = (0,) * len(inner)
        boxes.append(Bounds((first_row, *zeros), (end_row, *inner)))
    if left and first_row <= end_row:
        boxes += _in_row(end_row, boxes_of_run(inner, 0, left))
    return boxes


def _in_row(row: int, boxes: Sequence[Bounds]) -> list[Bounds]:
    return [Bounds((row, *low), (row + 1, *high)) for low, high in boxes]


def are_disjoint(boxes: Sequence[Bounds]) -> bool:
    """Whether no element lies in two of the boxes. They have one dimension or more."""
    reached: list[Bounds] = []
    for box in sorted(boxes):
        reached = [other for other in reached if other.high[0] > box.low[0]]
        if any(_overlap(box, other) for other in reached):
            return False
        reached.append(box)
    return True


def _overlap(one: Bounds, other: Bounds) -> bool:
    return all(
        max(lows) < min(highs)
        for lows, highs in zip(
            zip(one.low, other.low, strict=True),
            zip(one.high, other.high, strict=True),
            strict=True,
        )
    )


def num_covered(boxes: Sequence[Bounds]) -> int:
    """How many elements lie in one of the boxes, or in several."""
    return _num_covered(boxes, 0)


def _num_covered(boxes: Sequence[Bounds], dim: int) -> int:
    if not boxes or dim == len(boxes[0].low):
        return min(len(boxes), 1)
    cuts = sorted({index for box in boxes for index in (box.low[dim], box.high[dim])})
    return sum(
        (end - start)
        * _num_covered([box for box in boxes if box.low[dim] <= start < box.high[dim]], dim + 1)
        for start, end in itertools.pairwise(cuts)
    )
