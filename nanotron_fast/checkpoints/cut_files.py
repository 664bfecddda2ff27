"""Files that several processes write, each a part: made before any of them, proved after all.

The first process makes such a file in its whole size, as one hole. A hole that nobody fills would
look like zeros, and the size says nothing: so the parts that were written are counted at the end.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from nanotron_fast.errors import PlanError
from nanotron_fast.moves.files import Folder
from nanotron_fast.moves.plan import MovePlan, OutputFile
from nanotron_fast.moves.shares import Part

# Path, and the bytes from the first number up to the second.
WrittenPart = tuple[str, int, int]


def cut_in(plan: MovePlan, shares: Iterable[Sequence[Part]]) -> list[OutputFile]:
    """The outputs of a plan of which the shares have parts, in the plan's order."""
    sizes = [output.size_bytes for output in plan.outputs]
    cut = {
        part.file
        for parts in shares
        for part in parts
        if part.end_bytes - part.begin_bytes < sizes[part.file]
    }
    return [plan.outputs[number] for number in sorted(cut)]


def make_hollow(content: Folder, outputs: Iterable[OutputFile]) -> None:
    """Makes files whose parts can then be written. Raises OSError."""
    for output in outputs:
        content.make_hollow(output.path, output.size_bytes)


def written_parts(outputs: Iterable[OutputFile]) -> list[WrittenPart]:
    """The parts among outputs that are written."""
    return [(each.path, *each.part) for each in outputs if each.part is not None]


def are_whole(parts: Collection[tuple[int, int]], size_bytes: int) -> bool:
    """Whether parts make up a file: every byte of it is in one of them, and in one alone."""
    position = 0
    for begin, end in sorted(parts):
        if begin != position or end <= begin:
            return False
        position = end
    return position == size_bytes


def check_written(outputs: Iterable[OutputFile], written: Iterable[WrittenPart]) -> None:
    """Proves that what all processes have written makes up the files. Raises PlanError."""
    parts: dict[str, list[tuple[int, int]]] = {}
    for path, begin, end in written:
        parts.setdefault(path, []).append((begin, end))
    for output in outputs:
        found = sorted(parts.get(output.path, []))
        if not are_whole(found, output.size_bytes):
            raise PlanError(
                f"{output.path}: of its {output.size_bytes:,} bytes the processes have written "
                + (", ".join(f"{begin:,} to {end:,}" for begin, end in found) or "none")
            )
