"""The order of a blend is Nanotron's, wherever one begins to read."""

from __future__ import annotations

import numpy as np
import pytest

from nanotron_fast import _C
from nanotron_fast.errors import DataError
from nanotron_fast.train.data.blend import BlendedSamples, BlendOrder
from tests.train.data.nanotron_order import blend

WEIGHTS = (
    [1.0, 1.0],
    [0.5, 0.3, 0.2],
    [1, 1, 1, 1, 1, 1, 1],
    [0.1, 0.5, 0.3, 0.1],
    [3, 0, 1],
    [0.97, 0.01, 0.01, 0.01],
    [0.123456789, 0.2718281828, 0.31415926535, 0.7],
)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_each_sample_comes_from_the_source_that_nanotron_takes(weights: list[float]) -> None:
    size = 70_000
    sources, places = blend(weights, size)
    order = BlendOrder(weights)
    # Backwards, and across the border of what is kept at once.
    indices = [*range(size - 1, 65_000, -1), *range(0, 65_000, 97), 65_535, 65_536]
    assert [order[i] for i in indices] == [(sources[i], places[i]) for i in indices]
    for count in (0, 1, 2, 65_536, size):
        expected = np.bincount(sources[:count], minlength=len(weights)).tolist()
        assert order.taken(count) == expected


def test_a_far_sample_is_the_one_that_reading_up_to_it_gives() -> None:
    weights = [0.4, 0.35, 0.25]
    far = 5_000_000
    order = BlendOrder(weights)
    normalised = np.array(weights) / np.sum(np.array(weights))
    taken = np.zeros(3, dtype=np.int64)
    _C.blend(normalised, taken, first=0, count=far)
    assert order.taken(far) == taken.tolist()
    assert BlendOrder(weights)[far][1] == taken[BlendOrder(weights)[far][0]]
    # Each source has its share at every moment, to within a sample or two.
    assert np.abs(taken - normalised * far).max() < 2


def test_one_source_needs_no_order() -> None:
    assert BlendOrder([3.0])[10**15] == (0, 10**15)
    assert BlendOrder([3.0]).taken(10**15) == [10**15]


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -0.5], [float("nan"), 1.0]], ids=str)
def test_weights_that_make_no_sense(weights: list[float]) -> None:
    with pytest.raises(DataError, match="blend"):
        BlendOrder(weights)


def test_sources_are_read_again_and_begin_where_they_are_told_to() -> None:
    sources, places = blend([2, 1], 50)
    tokens = [np.arange(5), np.arange(10, 13)]

    class Source:
        def __init__(self, values: np.ndarray) -> None:
            self.values = values

        def __len__(self) -> int:
            return len(self.values)

        def __getitem__(self, index: int) -> np.ndarray:
            return self.values[index % len(self.values)]

    samples = BlendedSamples([Source(each) for each in tokens], BlendOrder([2, 1]), [4, 1])
    for i in range(50):
        values = tokens[sources[i]]
        assert samples[i] == values[(places[i] + (4, 1)[sources[i]]) % len(values)]


def test_native_blend_refuses_arrays_of_another_kind() -> None:
    weights, taken = np.array([0.5, 0.5]), np.zeros(2, dtype=np.int64)
    with pytest.raises(ValueError, match="taken"):
        _C.blend(weights, taken.astype(np.int32), first=0, count=1)
    with pytest.raises(ValueError, match="weights and taken"):
        _C.blend(weights, np.zeros(3, dtype=np.int64), first=0, count=1)
    with pytest.raises(ValueError, match="room"):
        _C.blend(weights, taken, first=0, count=3, choices=np.zeros(2, dtype=np.uint16))
