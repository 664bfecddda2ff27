"""Carrying out a plan: the files of a checkpoint, written by all processes, whole or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nanotron_fast.checkpoints.destination import Destination
from nanotron_fast.checkpoints.plan.plan import Plan, peak_resident_bytes
from nanotron_fast.checkpoints.plan.sides import UNTIE
from nanotron_fast.checkpoints.processes import Processes
from nanotron_fast.checkpoints.small_files import copy_file, write_file
from nanotron_fast.errors import CheckpointError, ConfigError
from nanotron_fast.interruption import Interrupted
from nanotron_fast.moves import engine
from nanotron_fast.moves.engine import ProgressCallback

# Room for each of the small files whose contents are not made yet.
_DOCUMENT_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did. `engine_seconds` leaves out planning and the small files."""

    plan: Plan
    destination: Path
    seconds: float
    engine_seconds: float
    peak_rss_bytes: int

    @property
    def gigabytes_per_second(self) -> float:
        """Decimal gigabytes of tensor files written, over the whole time."""
        return self.plan.bytes_written / 1e9 / self.seconds if self.seconds else 0.0

    def to_json(self, workers: int) -> dict[str, Any]:
        """The contract of `convert --json`."""
        return {
            **self.plan.to_json(workers),
            "seconds": round(self.seconds, 6),
            "gigabytes_per_second": round(self.gigabytes_per_second, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "ignored_tensors": list(self.plan.ignored),
            "left_behind": list(self.plan.left_behind),
            "destination": str(self.destination),
        }


def carry_out(
    make_plan: Callable[[], Plan],
    dst: str | Path,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    fsync: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    on_progress: ProgressCallback | None = None,
    processes: Processes | None = None,
) -> Report:
    """Makes a plan on every process and carries it out: see `convert` for what is given.

    `dst` appears when it is whole; on any error, and when interrupted, it is as it was before.

    Raises:
        What `make_plan` raises; DestinationError (an OSError) where `dst` is in the way or the
        disk too small; CheckpointError where a source has changed; OSError.
    """
    started = time.perf_counter()
    processes = processes or Processes()
    workers = engine.default_workers() if workers is None else workers
    if workers < 1:
        raise ConfigError(f"--workers {workers}: it should be at least 1")
    destination: Destination | None = None
    try:
        with processes.step():
            ready = make_plan()
            destination = Destination(
                Path(dst), source=ready.source, overwrite=overwrite, inputs=_inputs(ready)
            )
            names = _names(ready)
            if processes.rank == 0:
                destination.check(names)
                if ready.check_source is not None:
                    ready.check_source()
                _check_equal(ready, workers)
                if on_plan is not None:
                    on_plan(ready)
                destination.open(_sizes(ready), names)
        with processes.step():
            engine_started = time.perf_counter()
            is_first = processes.rank == 0
            engine.execute(
                ready.transfer.share(processes.rank, processes.world_size),
                destination.partial,
                workers=workers,
                fsync=fsync,
                on_progress=on_progress,
                meanwhile=partial(_write_documents, ready, destination.partial, fsync)
                if is_first
                else None,
            )
            engine_seconds = time.perf_counter() - engine_started
        with processes.step():
            if processes.rank == 0:
                destination.commit(fsync=fsync, names=names)
        return Report(
            ready,
            destination.path,
            time.perf_counter() - started,
            engine_seconds,
            peak_resident_bytes(),
        )
    except BaseException as error:
        if destination is not None:
            destination.abort()
            if isinstance(error, Interrupted):
                is_first = processes.rank == 0
                error.remains = (
                    destination.remains() if is_first else f"process {processes.rank} has ended"
                )
        raise


def _names(ready: Plan) -> frozenset[str]:
    """Paths of the small files that will lie in the destination."""
    return frozenset((*ready.documents, *ready.copies))


def _sizes(ready: Plan) -> Iterator[int]:
    """Bytes of every file and folder that will be written; a folder takes a block."""
    folders = {os.path.dirname(output.path) for output in ready.transfer.outputs}
    parents = {folder[:at] for folder in folders for at in _slashes(folder)}
    yield from (1 for _ in folders | parents)
    yield from (output.size_bytes for output in ready.transfer.outputs)
    yield from (_DOCUMENT_BYTES for _ in ready.documents)
    yield from (path.stat().st_size for path in ready.copies.values())


def _slashes(path: str) -> Iterator[int]:
    return (at for at, letter in enumerate(path) if letter == "/")


def _inputs(ready: Plan) -> set[Path]:
    """The folders outside the source that files are read from: behind links, a tokenizer's."""
    within = os.path.join(ready.source, "")
    found: set[str] = set()
    for path in map(os.fspath, (*ready.transfer.sources, *ready.copies.values())):
        if os.path.islink(path):
            found.add(os.path.dirname(os.path.realpath(path)))
        elif not path.startswith(within):
            found.add(os.path.dirname(path))
    return set(map(Path, found))


def _check_equal(ready: Plan, workers: int) -> None:
    """Compares the copies of a tied matrix. Raises CheckpointError where they differ."""
    for named in ready.must_be_equal:
        paths = ready.transfer.sources
        differing = engine.compare(paths, paths, [named.move], workers=workers)
        if differing:
            _, count, _ = differing[0]
            raise CheckpointError(
                f"{paths[named.move.destination]}: tie_word_embeddings is true, but {named.param} "
                f"differs from {named.hf_name} in {count} of {named.move.num_elements} elements. "
                f"{UNTIE}"
            )


def _write_documents(ready: Plan, root: Path, fsync: bool) -> None:
    for name, contents in ready.documents.items():
        write_file(root / name, contents(), fsync=fsync)
    for name, path in ready.copies.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(path, root / name, fsync=fsync)
