"""Runs of flattened tensors as boxes, and boxes that overlap, against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotron_fast.errors import PlanError
from nanotron_fast.moves.boxes import Bounds, are_disjoint, boxes_of_run, num_covered


def taken(array: np.ndarray, box: Bounds) -> np.ndarray:
    """The elements of a box, where it is not empty and not beyond the end."""
    for low, high, size in zip(box.low, box.high, array.shape, strict=True):
        assert 0 <= low < high <= size
    return array[tuple(map(slice, box.low, box.high))].reshape(-1)


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=4), st.data())
def test_the_boxes_of_a_run_are_its_elements_in_order(
    sizes: list[int], data: st.DataObject
) -> None:
    shape = tuple(sizes)
    first = data.draw(st.integers(0, math.prod(shape)))
    end = data.draw(st.integers(first, math.prod(shape)))
    boxes = boxes_of_run(shape, first, end)
    elements = np.arange(math.prod(shape)).reshape(shape)
    found = [index for box in boxes for index in taken(elements, box).tolist()]
    assert found == list(range(first, end))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert sum(box.num_elements for box in boxes) == end - first


def test_the_boxes_of_a_run_by_hand() -> None:
    assert boxes_of_run((4, 6), 6, 18) == [Bounds((1, 0), (3, 6))]
    assert boxes_of_run((4, 6), 8, 10) == [Bounds((1, 2), (2, 4))]
    assert boxes_of_run((2, 3, 4), 3, 22) == [
        Bounds((0, 0, 3), (1, 1, 4)),
        Bounds((0, 1, 0), (1, 3, 4)),
        Bounds((1, 0, 0), (2, 2, 4)),
        Bounds((1, 2, 0), (2, 3, 2)),
    ]


@pytest.mark.parametrize(("first", "end"), [(-1, 3), (4, 3), (0, 25), (25, 25)])
def test_a_run_that_is_not_in_the_tensor(first: int, end: int) -> None:
    with pytest.raises(PlanError, match=rf"elements {first} to {end} .* of \[4, 6\]"):
        boxes_of_run((4, 6), first, end)


@settings(deadline=None)
@given(
    st.integers(1, 3).flatmap(
        lambda num_dims: st.lists(
            st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=3).map(
                lambda sides: Bounds(
                    tuple(min(side) for side in sides[:num_dims]),
                    tuple(max(side) for side in sides[:num_dims]),
                )
            ),
            max_size=6,
        )
    )
)
def test_boxes_that_overlap(boxes: list[Bounds]) -> None:
    counts = np.zeros((6,) * len(boxes[0].low) if boxes else (6,), int)
    for box in boxes:
        counts[tuple(map(slice, box.low, box.high))] += 1
    assert num_covered(boxes) == np.count_nonzero(counts)
    assert are_disjoint(boxes) == (counts.max() <= 1)
