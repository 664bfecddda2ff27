"""Cutting plans into groups of files that need a bounded part of their sources."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanotron_fast.moves.groups import groups_of, joined, ranges_of
from nanotron_fast.moves.plan import MovePlan, OutputFile
from nanotron_fast.moves.row import FILL
from tests.plans import builders

FOLDER = Path("/nowhere")


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(builders(), st.integers(1, 5000), st.booleans())
def test_groups_are_the_plan_in_parts(build, limit, counts_outputs) -> None:
    plan = build.plan(FOLDER)
    groups = list(groups_of(plan, limit, counts_outputs=counts_outputs))
    outputs = [output for group in groups for output in group.plan.outputs]
    assert sorted(output.path for output in outputs) == [each.path for each in plan.outputs]
    assert sum(len(group.plan.moves) for group in groups) == len(plan.moves)
    for group in groups:
        group.plan.check()
        num_bytes = sum(end - begin for each in group.ranges.values() for begin, end in each)
        need = num_bytes + (group.plan.bytes_written if counts_outputs else 0)
        assert need <= limit or len(group.plan.outputs) == 1
        for move in group.plan.moves:
            if move.source == FILL:
                continue
            last = sum(
                (n - 1) * stride for n, stride in zip(move.sizes, move.source_strides, strict=True)
            )
            end = move.source_offset + (last + 1) * move.source_dtype.itemsize
            assert any(
                begin <= move.source_offset and end <= stop
                for begin, stop in group.ranges[move.source]
            )


def test_files_of_a_folder_stay_together(tmp_path) -> None:
    names = [f"{folder}/{rank}" for folder in "abc" for rank in range(2)]
    plan = MovePlan((), tuple(OutputFile(name, b"x" * 10, 10) for name in names), ())
    groups = groups_of(plan, 45, counts_outputs=True)
    paths = [[output.path for output in group.plan.outputs] for group in groups]
    assert paths == [["a/0", "a/1", "b/0", "b/1"], ["c/0", "c/1"]]


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([], []),
        ([(5, 9), (0, 5)], [(0, 9)]),
        ([(0, 100), (20, 30)], [(0, 100)]),
        ([(0, 1), (2, 3)], [(0, 1), (2, 3)]),
    ],
)
def test_ranges_are_joined_where_they_touch(ranges, expected) -> None:
    assert joined(ranges) == expected


def test_fills_read_nothing() -> None:
    assert ranges_of(()) == {}
