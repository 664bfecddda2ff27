"""The engine on sources of which some lie in a store: what it needs is fetched, part by part.

A plan is cut into groups of whole files, a comparison into groups of moves. The ranges that one
group reads are fetched to where they lie in the mirror's files, the engine runs as ever, and the
room is given back. So a disk holds `GROUP_BYTES` of the source at once, or what one file needs.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from nanotron_fast.checkpoints.remote.mirror import Mirror, mirror_of
from nanotron_fast.errors import DestinationError
from nanotron_fast.moves import engine
from nanotron_fast.moves.engine import ProgressCallback
from nanotron_fast.moves.files import Folder
from nanotron_fast.moves.groups import groups_of, ranges_of, source_ranges
from nanotron_fast.moves.move import Move
from nanotron_fast.moves.plan import MovePlan
from nanotron_fast.moves.row import FILL

GROUP_BYTES = 2 << 30


def execute(
    plan: MovePlan,
    root: Path | Folder,
    *,
    on_progress: ProgressCallback | None = None,
    meanwhile: Callable[[], None] | None = None,
    **more: Any,
) -> str:
    """Does what `engine.execute` does, with sources in mirrors too. Arguments and result are the
    same.

    Raises what that raises; CheckpointError where a source has changed in its store, OSError where
    it cannot be read, DestinationError where there is no room to hold what one group needs.
    """
    if not is_remote(plan.sources):
        return engine.execute(plan, root, on_progress=on_progress, meanwhile=meanwhile, **more)
    done, refusal = 0, ""
    if meanwhile is not None:
        meanwhile()
    for group in groups_of(plan, GROUP_BYTES, counts_outputs=False):
        with holding(plan.sources, group.ranges):
            said = engine.execute(
                group.plan,
                root,
                on_progress=behind(on_progress, done),
                **more,
            )
        done += group.plan.bytes_written
        refusal = refusal or said
    return refusal


def behind(on_progress: ProgressCallback | None, done: int) -> ProgressCallback | None:
    """What is told of one part of the work, behind the bytes of the parts before it."""
    if on_progress is None:
        return None
    tell = on_progress
    return lambda num_bytes: tell(done + num_bytes)


def compare(
    sources: Sequence[Path],
    destinations: Sequence[Path],
    moves: Sequence[Move],
    *,
    workers: int,
    on_progress: ProgressCallback | None = None,
) -> list[tuple[int, int, int]]:
    """Does what `engine.compare` does, with files in mirrors too. Raises what `execute` raises."""
    if not is_remote((*sources, *destinations)):
        return engine.compare(
            sources, destinations, moves, workers=workers, on_progress=on_progress
        )
    files = [*sources, *destinations]
    found: list[tuple[int, int, int]] = []
    done = 0
    for first, some in _move_groups(moves, len(sources)):
        ranges = ranges_of([each for move in some for each in _both_sides(move, len(sources))])
        with holding(files, ranges):
            differing = engine.compare(sources, destinations, some, workers=workers)
        found += [(first + move, count, offset) for move, count, offset in differing]
        done += sum(move.num_elements * move.destination_dtype.itemsize for move in some)
        if on_progress is not None:
            on_progress(done)
    return found


def _both_sides(move: Move, num_sources: int) -> Iterator[Move]:
    """What a comparison reads, as moves from numbered files: destinations behind the sources."""
    if move.source != FILL:
        yield move
    yield Move(
        source=num_sources + move.destination,
        source_offset=move.destination_offset,
        destination=0,
        destination_offset=0,
        sizes=move.sizes,
        source_strides=move.destination_strides,
        destination_strides=move.destination_strides,
        source_dtype=move.destination_dtype,
        destination_dtype=move.destination_dtype,
    )


def _move_groups(moves: Sequence[Move], num_sources: int) -> Iterator[tuple[int, Sequence[Move]]]:
    """Neighbours among moves that read `GROUP_BYTES` at most, and the number of their first."""
    first = num_bytes = 0
    for index, move in enumerate(moves):
        need = 0
        for each in _both_sides(move, num_sources):
            need += sum(end - begin for _, begin, end in source_ranges(each))
        if index > first and num_bytes + need > GROUP_BYTES:
            yield first, moves[first:index]
            first, num_bytes = index, 0
        num_bytes += need
    if first < len(moves):
        yield first, moves[first:]


def is_remote(paths: Sequence[Path]) -> bool:
    """Whether one of the files lies in a mirror."""
    return any(mirror_of(path) is not None for path in paths)


@contextmanager
def holding(
    files: Sequence[Path], ranges: Mapping[int, Sequence[tuple[int, int]]]
) -> Iterator[None]:
    """Fetches ranges of those files that lie in mirrors. Raises what `Mirror.holding` raises."""
    wanted: dict[Path, tuple[Mirror, dict[str, list[tuple[int, int]]]]] = {}
    for number, each in ranges.items():
        found = mirror_of(files[number])
        if found is not None:
            mirror, name = found
            wanted.setdefault(mirror.root, (mirror, {}))[1].setdefault(name, []).extend(each)
    need = sum(
        end - begin
        for _, by_name in wanted.values()
        for each in by_name.values()
        for begin, end in each
    )
    with ExitStack() as stack:
        for mirror, by_name in wanted.values():
            check_room(mirror.root, need)
            stack.enter_context(mirror.holding(by_name))
        yield


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises DestinationError where a temporary folder lies on a disk that is too small."""
    room = shutil.disk_usage(folder)
    if room.total and num_bytes > room.free:  # a file system that knows no size says 0
        raise DestinationError(
            errno.ENOSPC,
            f"what is read from or written to a store lies here for a while: {num_bytes:,} bytes "
            f"at once, and {room.free:,} are free; TMPDIR names another place",
            os.fspath(folder.parent),
        )
