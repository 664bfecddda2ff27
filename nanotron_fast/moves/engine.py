"""Running a plan in the native engine, with progress and a way to stop."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from nanotron_fast import _C
from nanotron_fast.interruption import ending, wait
from nanotron_fast.moves.checksums import write_checksums
from nanotron_fast.moves.files import FileState, Folder
from nanotron_fast.moves.move import Move, scales_of, table_of
from nanotron_fast.moves.plan import MovePlan, OutputFile

# Called now and then from the calling thread with the bytes done so far.
ProgressCallback = Callable[[int], None]
# Likewise with the outputs that are whole since the last call.
FinishedCallback = Callable[[Sequence[OutputFile]], None]
# Before that, with one output and the SHA-256 of each of its ranges.
DigestsCallback = Callable[[OutputFile, Sequence[bytes]], None]

_Result = TypeVar("_Result")

_MAX_DEFAULT_WORKERS = 16
_POLL_SECONDS = 0.1


def default_workers() -> int:
    """As many as this process may use cores, up to where disks stop gaining."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    return min(cores, _MAX_DEFAULT_WORKERS)


def execute(
    plan: MovePlan,
    root: Path | Folder,
    *,
    workers: int,
    fsync: bool = False,
    states: Mapping[Path, FileState] = MappingProxyType({}),
    on_progress: ProgressCallback | None = None,
    on_finished: FinishedCallback | None = None,
    meanwhile: Callable[[], None] | None = None,
    io: str = "buffered",
    hashed: Mapping[str, Sequence[tuple[int, int]]] = MappingProxyType({}),
    on_digests: DigestsCallback | None = None,
) -> str:
    """Writes every output of a plan under `root`, which must exist, and the outputs must not.

    An output in parts must be there, in its whole size: see `Folder.make_hollow`.

    Args:
        plan: what to write.
        root: a folder by its path, or one that is held open.
        workers: threads.
        fsync: return when the files are on the device; not their folders.
        states: what sources must still be whenever they are opened.
        on_progress: called now and then on the calling thread with the bytes written so far.
        on_finished: called likewise with the outputs that are whole since the last call.
        meanwhile: called once on the calling thread, while the engine works.
        io: how bytes pass, "buffered", "direct" or "dontcache" (see `moves.io`).
        hashed: by the paths of outputs, (offset, size) in bytes of ranges, ascending, to be hashed
            while they are at hand.
        on_digests: called with each output that has such ranges and is whole, and their digests.

    Returns:
        What a file system refused of `io`, and what was done instead; empty where nothing was.

    Raises:
        OSError: with errno and file name. CheckpointError: a source has changed. PlanError.
        KeyboardInterrupt: the workers have been stopped first.
    """
    if isinstance(root, Path):
        with Folder.open(root) as folder:
            return execute(
                plan,
                folder,
                workers=workers,
                fsync=fsync,
                states=states,
                on_progress=on_progress,
                on_finished=on_finished,
                meanwhile=meanwhile,
                io=io,
                hashed=hashed,
                on_digests=on_digests,
            )
    root.make_folders({os.path.dirname(output.path) for output in plan.outputs})
    progress = _C.Progress()

    def collect() -> None:
        finished = progress.take_finished()
        for index, digests in finished:
            output = plan.outputs[index]
            if output.checksums:
                write_checksums(root, output.path, output.checksums, workers=workers, fsync=fsync)
            if on_digests is not None and output.path in hashed:
                on_digests(output, digests)
        if on_finished is not None and finished:
            on_finished([plan.outputs[index] for index, _ in finished])

    return _run(
        lambda: _C.execute(
            [(os.fsencode(path), states.get(path)) for path in plan.sources],
            (root.descriptor, os.fsencode(root.path)),
            [
                (
                    os.fsencode(output.path),
                    [(0, output.header), *output.literals],
                    output.size_bytes,
                )
                for output in plan.outputs
            ],
            table_of(plan.moves),
            workers=workers,
            fsync=fsync,
            progress=progress,
            io=io,
            hashed=[hashed.get(output.path, ()) for output in plan.outputs] if hashed else (),
            there=[index for index, output in enumerate(plan.outputs) if output.part is not None],
            scales=scales_of(plan.moves),
        ),
        progress,
        on_progress,
        meanwhile,
        collect,
    )


def compare(
    sources: Sequence[Path],
    destinations: Sequence[Path],
    moves: Sequence[Move],
    *,
    workers: int,
    on_progress: ProgressCallback | None = None,
) -> list[tuple[int, int, int]]:
    """What the moves would change: (move, differing elements, byte of the first in its file)."""
    progress = _C.Progress()
    return _run(
        lambda: _C.compare(
            [os.fsencode(path) for path in sources],
            [os.fsencode(path) for path in destinations],
            table_of(moves),
            workers=workers,
            progress=progress,
            scales=scales_of(moves),
        ),
        progress,
        on_progress,
    )


def digest(
    files: Sequence[Path],
    ranges: Sequence[tuple[int, int, int]],
    *,
    workers: int,
    io: str = "buffered",
    on_progress: ProgressCallback | None = None,
) -> list[bytes]:
    """The SHA-256 of each range, in their order.

    Args:
        files: what is read.
        ranges: (place in `files`, offset, size), the last two in bytes.
        workers: threads, which share the ranges.
        io: as for `execute`.
        on_progress: called now and then with the bytes hashed so far.

    Raises:
        OSError: with errno and file name. CheckpointError: a file ends within a range.
    """
    progress = _C.Progress()
    return _run(
        lambda: _C.digest(
            [(os.fsencode(path), None) for path in files],
            ranges,
            workers=workers,
            progress=progress,
            io=io,
        ),
        progress,
        on_progress,
    )


def _run(
    work: Callable[[], _Result],
    progress: _C.Progress,
    on_progress: ProgressCallback | None,
    meanwhile: Callable[[], None] | None = None,
    collect: Callable[[], None] = lambda: None,
) -> _Result:
    """Runs native work on a thread, so that this one can report, and answer the keyboard.

    `collect` is called now and then, and at the end, however it ends.
    """
    results: list[_Result] = []
    errors: list[BaseException] = []
    # Not Thread.join: in Python up to 3.12, one that the keyboard interrupts believes the thread
    # has ended, and the next one returns at once, with the workers still writing.
    finished = threading.Event()

    def guarded() -> None:
        try:
            results.append(work())
        except BaseException as error:  # handed to the caller below
            errors.append(error)
        finally:
            finished.set()

    threading.Thread(target=guarded, name="nanotron_fast-engine").start()
    try:
        if meanwhile is not None:
            meanwhile()
        while not wait(finished, _POLL_SECONDS):
            collect()
            if on_progress is not None:
                on_progress(progress.bytes_done)
    except BaseException:
        with ending():
            progress.cancel()
            finished.wait()
            with contextlib.suppress(OSError):  # the first error is the one to tell
                collect()
        raise
    if errors:
        with ending(), contextlib.suppress(OSError):
            collect()
        raise errors[0]
    collect()
    if on_progress is not None:
        on_progress(progress.bytes_done)
    return results[0]
