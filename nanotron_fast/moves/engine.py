"""Running a plan in the native engine, with progress and a way to stop."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanotron_fast import _C
from nanotron_fast.interruption import ending
from nanotron_fast.moves.move import Move, table_of
from nanotron_fast.moves.plan import MovePlan

# Called now and then from the calling thread with the bytes done so far.
ProgressCallback = Callable[[int], None]

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
    root: Path,
    *,
    workers: int,
    fsync: bool = False,
    on_progress: ProgressCallback | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Writes every output of a plan under `root`, which must exist.

    `meanwhile` is called once on the calling thread, while the engine works.
    Raises OSError with errno and file name, PlanError; KeyboardInterrupt stops the workers first.
    """
    # Strings, not pathlib: of thousands of files, making the Paths costs as much as creating them.
    base = os.fspath(root)
    paths = [os.path.join(base, output.path) for output in plan.outputs]
    for folder in sorted({os.path.dirname(path) for path in paths}):
        os.makedirs(folder, exist_ok=True)
    outputs = [
        (os.fsencode(path), output.header, output.size_bytes)
        for path, output in zip(paths, plan.outputs, strict=True)
    ]
    progress = _C.Progress()
    _run(
        lambda: _C.execute(
            [os.fsencode(path) for path in plan.sources],
            outputs,
            table_of(plan.moves),
            workers=workers,
            fsync=fsync,
            progress=progress,
        ),
        progress,
        on_progress,
        meanwhile,
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
    result: list[tuple[int, int, int]] = []
    _run(
        lambda: result.extend(
            _C.compare(
                [os.fsencode(path) for path in sources],
                [os.fsencode(path) for path in destinations],
                table_of(moves),
                workers=workers,
                progress=progress,
            )
        ),
        progress,
        on_progress,
    )
    return result


def _run(
    work: Callable[[], Any],
    progress: _C.Progress,
    on_progress: ProgressCallback | None,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Runs native work on a thread, so that this one can report, and answer the keyboard."""
    errors: list[BaseException] = []
    # Not Thread.join: in Python up to 3.12, one that the keyboard interrupts believes the thread
    # has ended, and the next one returns at once, with the workers still writing.
    finished = threading.Event()

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # handed to the caller below
            errors.append(error)
        finally:
            finished.set()

    threading.Thread(target=guarded, name="nanotron_fast-engine").start()
    try:
        if meanwhile is not None:
            meanwhile()
        while not finished.wait(_POLL_SECONDS):
            if on_progress is not None:
                on_progress(progress.bytes_done)
    except BaseException:
        with ending():
            progress.cancel()
            finished.wait()
        raise
    if errors:
        raise errors[0]
    if on_progress is not None:
        on_progress(progress.bytes_done)
