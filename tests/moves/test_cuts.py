"""Moves cut where the file that they write to is cut: together they are the whole move."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotron_fast.moves.cuts import can_be_cut, within
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.move import Move
from nanotron_fast.moves.row import FILL

MOVE = Move(0, 100, 0, 8, (2, 3, 2), (6, 2, 1), (6, 2, 1), Dtype.F32, Dtype.F32)


def elements_of(move: Move) -> dict[int, int]:
    """Where each element comes from, by where it goes to; both in bytes."""
    found: dict[int, int] = {}
    for at in itertools.product(*map(range, move.sizes)):
        to, source = (
            sum(i * stride for i, stride in zip(at, strides, strict=True))
            for strides in (move.destination_strides, move.source_strides)
        )
        begin = move.destination_offset + to * move.destination_dtype.itemsize
        assert begin not in found
        is_read = move.source != FILL
        found[begin] = is_read * (move.source_offset + source * move.source_dtype.itemsize)
    return found


@st.composite
def moves(draw: st.DrawFn) -> Move:
    """Any order of dimensions on both sides, with gaps between rows of the destination."""
    sizes = tuple(draw(st.integers(1, 4)) for _ in range(3))
    sides = []
    for _ in range(2):
        strides, stride = [0, 0, 0], 1
        for dim in draw(st.permutations(range(3))):
            strides[dim] = stride
            stride = stride * sizes[dim] + draw(st.integers(0, 2))
        sides.append(tuple(strides))
    source, destination = draw(st.sampled_from(Dtype)), draw(st.sampled_from(Dtype))
    offset = draw(st.integers(0, 5)) * destination.itemsize
    number = draw(st.integers(FILL, 1))
    if number == FILL:
        sides[0] = (0, 0, 0)
    return Move(number, 16, 3, offset, sizes, *sides, source, destination)


@settings(deadline=None, max_examples=300)
@given(moves(), st.integers(0, 80), st.integers(0, 80))
def test_the_parts_of_a_move_are_the_move(move: Move, one: int, other: int) -> None:
    item = move.destination_dtype.itemsize
    assert can_be_cut(move, item)
    begin, end = sorted((one * item, other * item))
    found: dict[int, int] = {}
    for piece in within(move, begin, end):
        elements = elements_of(piece)
        assert not found.keys() & elements.keys()
        found |= elements
        assert replace(move, sizes=piece.sizes) == replace(
            piece,
            source_offset=move.source_offset,
            destination_offset=move.destination_offset,
        )
    assert found == {to: at for to, at in elements_of(move).items() if begin <= to < end}
    assert len(within(move, begin, end)) <= 5


def test_a_move_that_lies_within_stays_as_it_is() -> None:
    (piece,) = within(MOVE, 8, 8 + 48)
    assert piece is MOVE
    assert within(MOVE, 0, 8) == within(MOVE, 56, 64) == []


def test_a_cut_in_a_row_makes_the_rest_of_it_whole_rows_and_the_beginning_of_one() -> None:
    move = replace(
        MOVE, sizes=(4, 10, 1), source_strides=(10, 1, 1), destination_strides=(10, 1, 1)
    )
    pieces = within(move, 8 + 4 * 15, 8 + 4 * 33)
    assert [piece.sizes for piece in pieces] == [(1, 5, 1), (1, 10, 1), (1, 3, 1)]


@pytest.mark.parametrize(
    ("changes", "multiple"),
    [
        ({"destination_offset": 10}, 8),
        ({}, 6),
        # Rows that reach into each other.
        ({"sizes": (2, 3, 1), "destination_strides": (3, 2, 1)}, 8),
    ],
)
def test_what_cannot_be_cut(changes: dict[str, object], multiple: int) -> None:
    assert can_be_cut(MOVE, 8)
    assert not can_be_cut(replace(MOVE, **changes), multiple)  # type: ignore[arg-type]
