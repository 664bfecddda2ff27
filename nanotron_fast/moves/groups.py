"""Cutting a plan into parts that are carried out one after another, each with bounded needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from nanotron_fast.moves.move import Move
from nanotron_fast.moves.plan import MovePlan
from nanotron_fast.moves.row import FILL


@dataclass(frozen=True, slots=True)
class Group:
    """Some of a plan's files, and which ranges of which sources they are made from."""

    plan: MovePlan
    ranges: Mapping[int, Sequence[tuple[int, int]]]


def source_ranges(move: Move) -> Iterator[tuple[int, int, int]]:
    """What a move reads: source, and the bytes from the first to behind the last.

    A quantised source has its scales beside it; a fill reads nothing.
    """
    if move.source != FILL:
        begin = move.source_offset
        yield move.source, begin, begin + move.source_span * move.source_dtype.itemsize
    if move.scales is not None:
        yield move.scales.source, *move.scales_range


def joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order, without overlaps; those that touch as one."""
    result: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if result and begin <= result[-1][1]:
            result[-1] = result[-1][0], max(result[-1][1], end)
        else:
            result.append((begin, end))
    return result


def ranges_of(moves: Sequence[Move]) -> dict[int, list[tuple[int, int]]]:
    """Which ranges of which sources moves read, by the number of the source."""
    found: dict[int, list[tuple[int, int]]] = {}
    for move in moves:
        for source, begin, end in source_ranges(move):
            found.setdefault(source, []).append((begin, end))
    return {source: joined(ranges) for source, ranges in found.items()}


def groups_of(plan: MovePlan, limit_bytes: int, *, counts_outputs: bool) -> Iterator[Group]:
    """Groups of whole files, of neighbours in the plan, that read `limit_bytes` at most.

    A file that needs more by itself is a group by itself. With `counts_outputs` the bytes that are
    written count as well. Files of one folder are made from the same bytes and stay together where
    the limit lets them.
    """
    by_output: list[list[Move]] = [[] for _ in plan.outputs]
    for move in plan.moves:
        by_output[move.destination].append(move)

    def need(outputs: Sequence[int]) -> int:
        read = ranges_of([move for output in outputs for move in by_output[output]])
        num_bytes = sum(end - begin for each in read.values() for begin, end in each)
        if counts_outputs:
            num_bytes += sum(plan.outputs[output].size_bytes for output in outputs)
        return num_bytes

    pending: list[int] = []
    pending_bytes = 0
    for folder in _folders(plan):
        whole = need(folder)
        parts = [(whole, folder)]
        if whole > limit_bytes:
            parts = [(need([output]), [output]) for output in folder]
        for num_bytes, outputs in parts:
            if pending and pending_bytes + num_bytes > limit_bytes:
                yield _group(plan, by_output, pending)
                pending, pending_bytes = [], 0
            pending += outputs
            pending_bytes += num_bytes
    if pending:
        yield _group(plan, by_output, pending)


def _folders(plan: MovePlan) -> list[list[int]]:
    folders: dict[str, list[int]] = {}
    for index, output in enumerate(plan.outputs):
        folder, _, name = output.path.rpartition("/")
        folders.setdefault(folder or name, []).append(index)
    return list(folders.values())


def _group(plan: MovePlan, by_output: Sequence[list[Move]], outputs: Sequence[int]) -> Group:
    moves = [
        replace(move, destination=number)
        for number, output in enumerate(outputs)
        for move in by_output[output]
    ]
    return Group(
        replace(
            plan,
            outputs=tuple(plan.outputs[output] for output in outputs),
            moves=tuple(moves),
        ),
        ranges_of(moves),
    )
