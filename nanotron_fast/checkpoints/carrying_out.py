"""Carrying out a plan: the files of a checkpoint, written by all processes, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nanotron_fast.checkpoints import cut_files
from nanotron_fast.checkpoints.checking import check_same, check_source, check_unchanged
from nanotron_fast.checkpoints.destination import Destination
from nanotron_fast.checkpoints.fingerprint import Made, made_by, states_of
from nanotron_fast.checkpoints.io_modes import check_mode, mode_for
from nanotron_fast.checkpoints.journal import Journal, read_record
from nanotron_fast.checkpoints.manifest import ranges_of, write_manifest
from nanotron_fast.checkpoints.partial import Partial, whole_outputs
from nanotron_fast.checkpoints.plan.plan import Plan, peak_resident_bytes
from nanotron_fast.checkpoints.processes import Processes
from nanotron_fast.checkpoints.remote import running
from nanotron_fast.checkpoints.remote.urls import DESTINATION, as_path, is_url, without_password
from nanotron_fast.checkpoints.settling import Wishes, settle, take_over
from nanotron_fast.checkpoints.small_files import copy_file, write_file
from nanotron_fast.errors import ConfigError, add_note, puts_in_doubt
from nanotron_fast.formats.manifest import NAME as MANIFEST
from nanotron_fast.interruption import Interrupted, ending
from nanotron_fast.moves import engine
from nanotron_fast.moves.engine import ProgressCallback
from nanotron_fast.moves.files import ReadFile
from nanotron_fast.moves.plan import MovePlan, OutputFile
from nanotron_fast.units import count, size

_NO_WISHES = Wishes()
# Room for each of the small files whose contents are not made yet.
_DOCUMENT_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did. `engine_seconds` leaves out planning and the small files."""

    plan: Plan
    destination: Path | str
    seconds: float
    engine_seconds: float
    peak_rss_bytes: int
    # What this run wrote: all of the plan, or what was left of it.
    part: MovePlan
    share: tuple[int, int] | None = None
    warnings: tuple[str, ...] = ()
    # How bytes passed: what `auto` came to.
    io: str = "buffered"

    def __repr__(self) -> str:
        return (
            f"<Report: {self.plan.what}, {self.destination}: {size(self.part.bytes_written)} in "
            f"{count(len(self.part.outputs), 'file')}, {self.seconds:.2f} s>"
        )

    @property
    def gigabytes_per_second(self) -> float:
        """Decimal gigabytes of tensor files written, over the whole time."""
        return self.part.bytes_written / 1e9 / self.seconds if self.seconds else 0.0

    def to_json(self, workers: int) -> dict[str, Any]:
        """The contract of `convert --json`."""
        return {
            **self.plan.to_json(workers, io=self.io),
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
    wishes: Wishes = _NO_WISHES,
    io: str = "auto",
    manifest: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    on_total: Callable[[int], None] | None = None,
    on_progress: ProgressCallback | None = None,
    processes: Processes | None = None,
) -> Report:
    """Makes a plan on every process and carries it out: see `convert` for what is given.

    `dst` appears when it is whole. On an error, and when interrupted, it is as it was before; what
    was finished by then stays beside it where another run can go on with it.

    Raises:
        What `make_plan` raises; DestinationError (an OSError) where `dst` is in the way or the
        disk too small; CheckpointError where a source has changed; OSError.
    """
    started = time.perf_counter()
    processes = processes or Processes()
    workers = engine.default_workers() if workers is None else workers
    if workers < 1:
        raise ConfigError(f"--workers {workers}: it should be at least 1")
    dst = as_path(dst, DESTINATION)
    check_choices(dst, wishes, fsync=fsync, io=io, manifest=manifest)
    if is_url(dst):
        from nanotron_fast.checkpoints.remote.upload import upload

        ready, shown, engine_seconds = upload(
            make_plan,
            str(dst),
            overwrite=overwrite,
            workers=workers,
            check=partial(check_source, workers=workers),
            on_plan=on_plan,
            on_total=on_total,
            on_progress=on_progress,
            processes=processes,
        )
        seconds = time.perf_counter() - started
        peak = peak_resident_bytes()
        return Report(ready, shown, seconds, engine_seconds, peak, ready.transfer)
    run = _Run(dst, processes, wishes, workers=workers, fsync=fsync, io=io, manifest=manifest)
    try:
        run.prepare(make_plan, on_plan, overwrite=overwrite)
        run.write(on_total, on_progress)
        return run.end()
    except BaseException as error:
        run.abort(error)
        raise


def check_choices(dst: str | Path, wishes: Wishes, *, fsync: bool, io: str, manifest: bool) -> None:
    """Refuses what has no meaning in a store, and what `io` cannot be. Raises ConfigError."""
    check_mode(io)
    if not is_url(dst):
        return
    given = {
        "--resume": wishes.resume,
        "--overwrite-partial": wishes.overwrite_partial,
        "--share": wishes.share is not None,
        "--finish": wishes.finish,
        "--fsync": fsync,
        "--manifest": manifest,
        "--io": io != "auto",
    }
    for option, is_given in given.items():
        if is_given:
            raise ConfigError(
                f"{option}: it is for a directory, and {without_password(str(dst))} is in a store"
            )


class _Run:
    """One process's part in carrying out a plan."""

    _plan: Plan
    _destination: Destination
    _journal: Journal
    _states: Mapping[Path, ReadFile]
    # What is left for all processes of this run, the files of it that are written in parts, and
    # what of it is this process's.
    _todo: MovePlan
    _cut: Sequence[OutputFile]
    _share: MovePlan

    def __init__(
        self,
        dst: str | Path,
        processes: Processes,
        wishes: Wishes,
        *,
        workers: int,
        fsync: bool,
        io: str,
        manifest: bool,
    ) -> None:
        self._dst = Path(dst)
        self._processes = processes
        self._wishes = wishes
        self._workers = workers
        self._fsync = fsync
        self._io = io
        self._has_manifest = manifest
        # Of the outputs that this process has written, in hexadecimal.
        self._digests: dict[str, Sequence[str]] = {}
        self._warnings: list[str] = []
        self._started = time.perf_counter()
        self._engine_seconds = 0.0
        # The outputs that are whole, of runs before and of this process, and the parts of others.
        self._adopted: set[str] = set()
        self._finished: set[str] = set()
        self._parts: list[cut_files.WrittenPart] = []
        self._is_open = self._has_destination = False

    @property
    def _is_first(self) -> bool:
        return self._processes.rank == 0

    @property
    def _names(self) -> frozenset[str]:
        """Paths of the small files that will lie in the destination."""
        own = (MANIFEST,) if self._has_manifest else ()
        return frozenset((*self._plan.documents, *self._plan.copies, *own))

    def prepare(
        self,
        make_plan: Callable[[], Plan],
        on_plan: Callable[[Plan], None] | None,
        *,
        overwrite: bool,
    ) -> None:
        """Plans, agrees with the other processes, and opens the folder to write to."""
        processes, wishes = self._processes, self._wishes
        if processes.world_size > 1 and (wishes.share or wishes.finish):
            option = "--share" if wishes.share else "--finish"
            raise ConfigError(
                f"{option}: it is for processes that do not know each other, and here are "
                f"{processes.world_size} of torchrun's"
            )
        with processes.step():
            self._plan = make_plan()
            self._destination = Destination(
                self._dst,
                source=self._plan.source,
                overwrite=overwrite,
                inputs=_inputs(self._plan),
                share=wishes.share,
            )
            self._has_destination = True
            self._states = states_of(self._plan)
            made = made_by(self._plan, self._states)
        with processes.step():
            boots = check_same(processes, made)
        with processes.step():
            if self._is_first:
                self._open(made, boots, on_plan)
        place, adopted = processes.gather((self._destination.place, self._adopted))[0]
        with processes.step():
            self._adopted = set(adopted)
            self._todo = self._part(self._adopted)
            if not self._is_first:
                self._begin_journal(self._destination.join(place), boots)
            self._deal()

    def _open(
        self, made: Made, boots: Collection[str], on_plan: Callable[[Plan], None] | None
    ) -> None:
        """The first process's part: its run's folder, with what runs before it have finished."""
        plan, destination, wishes = self._plan, self._destination, self._wishes
        names = self._names
        destination.check(names)
        destination.lock()
        earlier = settle(destination, made, plan.transfer, wishes, boots)
        check_source(plan, self._workers)
        if on_plan is not None:
            on_plan(plan)
        done: set[str] = set()
        for leftover in earlier:
            done |= set(whole_outputs(leftover, plan.transfer.outputs, boots))
        partial = destination.open(_sizes(plan, self._part(done).outputs), names)
        self._begin_journal(partial, boots)
        self._journal.begin(made, wishes.share, time.time())
        take_over(earlier, partial, self._journal, plan.transfer, boots, self._adopted)

    def _begin_journal(self, partial: Partial, boots: Collection[str]) -> None:
        # What another machine may go on with has to be on the device first.
        syncs = self._fsync or self._wishes.share is not None or len(boots) > 1
        rank = self._processes.rank
        self._journal = Journal(partial.folder, partial.content, rank, syncs=syncs)
        self._is_open = True

    def _deal(self) -> None:
        """Finds this process's share, and makes the files that several processes write."""
        # A tensor is hashed by one process, in the order of its bytes.
        shares = self._todo.deal(self._processes.world_size, cuts=not self._has_manifest)
        self._share = self._todo.parts(shares[self._processes.rank])
        self._cut = cut_files.cut_in(self._todo, shares)
        if self._is_first:
            cut_files.make_hollow(self._destination.partial.content, self._cut)

    def _part(self, finished: Collection[str]) -> MovePlan:
        """What is left for this run, over all of its processes."""
        transfer = self._plan.transfer
        if self._wishes.share:
            number, total = self._wishes.share
            transfer = transfer.share(number - 1, total)
        return transfer.without(finished)

    def write(
        self, on_total: Callable[[int], None] | None, on_progress: ProgressCallback | None
    ) -> None:
        """Writes this process's files, and its parts of others."""
        processes, partial = self._processes, self._destination.partial
        part = self._share
        if on_total is not None:
            on_total(part.bytes_written)
        with processes.step():
            started = time.perf_counter()
            num_bytes = self._plan.bytes_read + self._plan.bytes_written
            self._io = mode_for(self._io, partial.content.path, num_bytes)
            refusal = running.execute(
                part,
                partial.content,
                workers=self._workers,
                fsync=self._fsync,
                states={path: read.state for path, read in self._states.items()},
                on_progress=on_progress,
                on_finished=self._note,
                meanwhile=self._write_documents,
                io=self._io,
                hashed=ranges_of(part.outputs) if self._has_manifest else {},
                on_digests=self._keep,
            )
            if refusal:
                self._warnings.append(f"--io {self._io}: {refusal}")
            self._journal.finish()
            self._engine_seconds = time.perf_counter() - started

    def _write_documents(self) -> None:
        """The small files: the first process's, and not a share's."""
        if not self._is_first or self._wishes.share:
            return
        plan, root, fsync = self._plan, self._destination.partial.content, self._fsync
        root.make_folders({os.path.dirname(name) for name in self._names})
        for name, contents in plan.documents.items():
            write_file(Path(name), contents(), fsync=fsync, within=root)
        for name, path in plan.copies.items():
            copy_file(path, Path(name), self._states[path], fsync=fsync, within=root)

    def _keep(self, output: OutputFile, digests: Sequence[bytes]) -> None:
        self._digests[output.path] = [each.hex() for each in digests]
        self._journal.keep(output.path, self._digests[output.path])

    def _note(self, outputs: Sequence[OutputFile]) -> None:
        self._journal.add(outputs)
        self._parts += cut_files.written_parts(outputs)
        self._finished |= {output.path for output in outputs if output.part is None}

    def end(self) -> Report:
        """Gives the result its name; a share leaves it to the run that finishes."""
        processes, destination = self._processes, self._destination
        digests: dict[str, Sequence[str]] = {}
        if self._has_manifest:
            for each in processes.gather(self._digests):
                digests |= each
        written = [part for parts in processes.gather(self._parts) for part in parts]
        with processes.step():
            self._journal.close()
            if self._is_first:
                cut_files.check_written(self._cut, written)
                check_unchanged(self._states)
                if self._wishes.share:
                    destination.leave()
                else:
                    outputs = self._plan.transfer.outputs
                    if self._has_manifest:
                        write_manifest(
                            destination.partial,
                            outputs,
                            digests,
                            workers=self._workers,
                            io=self._io,
                            fsync=self._fsync,
                        )
                    self._warnings += destination.commit(
                        outputs, fsync=self._fsync, names=self._names
                    )
        return Report(
            self._plan,
            destination.path,
            time.perf_counter() - self._started,
            self._engine_seconds,
            peak_resident_bytes(),
            self._todo,
            self._wishes.share,
            tuple(self._warnings),
            self._io,
        )

    def abort(self, error: BaseException) -> None:
        """Ends before the time. What is whole stays.

        Where the error puts in doubt what this run has written, only what runs before had finished
        stays: at the time of the plan, the source was what it was for them.
        """
        with ending():
            if self._is_open:
                self._journal.close()
            if not self._has_destination:
                return
            in_doubt = self._processes.is_in_doubt or puts_in_doubt(error)
            num_whole = len(self._adopted) if in_doubt else self._count_whole()
            keeps = self._is_open and num_whole > 0
            self._destination.abort(keeps=keeps, only=self._adopted if in_doubt else None)
            if not self._is_first:
                if isinstance(error, Interrupted):
                    error.remains = f"process {self._processes.rank} has ended"
                return
            again = _again(self._wishes, in_doubt=in_doubt)
            total = len(self._plan.transfer.outputs)
            remains = self._destination.remains(num_whole, total, again)
            if in_doubt and self._finished:
                remains = f"what this run wrote is given up; {remains}"
            if isinstance(error, Interrupted):
                error.remains = remains
            elif keeps or self._destination.is_lost or (in_doubt and self._finished):
                add_note(error, remains)

    def _count_whole(self) -> int:
        """Files that are whole: for the first process, which keeps them, those of all processes."""
        if self._is_open and self._is_first and self._processes.world_size > 1:
            # The error that it is asked after is the one to tell.
            with contextlib.suppress(OSError):
                return len(read_record(self._destination.partial.folder).entries)
        return len(self._adopted | self._finished)


def _again(wishes: Wishes, *, in_doubt: bool) -> str:
    """What may be done with the files that stay after an end before time, in words."""
    where = " where the source is as it was when they were written" if in_doubt else ""
    if wishes.finish:
        return f"--finish goes on with them{where}"
    return f"--resume goes on with them{where}, --overwrite-partial begins anew"


def _sizes(ready: Plan, outputs: Sequence[OutputFile]) -> Iterator[int]:
    """Bytes of every file and folder that will be written; a folder takes a block."""
    folders = {os.path.dirname(output.path) for output in outputs}
    parents = {
        folder[:at] for folder in folders for at, letter in enumerate(folder) if letter == "/"
    }
    yield from (1 for _ in folders | parents)
    yield from (output.size_bytes for output in outputs)
    yield from (_DOCUMENT_BYTES for _ in ready.documents)
    yield from (path.stat().st_size for path in ready.copies.values())


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
