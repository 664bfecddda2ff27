"""Carrying a plan out into a store: whole files, a few at a time, what marks a checkpoint last.

A store has no folder that could be renamed. So tensor files are made in a temporary folder, group
by group, and uploaded; then come the small files, and last the one by which readers know a whole
checkpoint. What was uploaded is removed when something fails. `claim.py` keeps other runs out.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path

from nanotron_fast.checkpoints.checking import check_same, check_unchanged
from nanotron_fast.checkpoints.fingerprint import made_by, states_of
from nanotron_fast.checkpoints.plan.plan import Plan
from nanotron_fast.checkpoints.processes import PeerGone, Processes
from nanotron_fast.checkpoints.remote import running
from nanotron_fast.checkpoints.remote.claim import StoreClaim, is_claim
from nanotron_fast.checkpoints.remote.mirror import Mirror
from nanotron_fast.checkpoints.remote.store import Store, Version, at_once
from nanotron_fast.checkpoints.small_files import copy_file
from nanotron_fast.errors import DestinationError, NanotronFastError
from nanotron_fast.formats.known_files import foreign_names
from nanotron_fast.interruption import Interrupted, ending
from nanotron_fast.moves.engine import ProgressCallback
from nanotron_fast.moves.files import ReadFile
from nanotron_fast.moves.groups import groups_of
from nanotron_fast.moves.plan import MovePlan
from nanotron_fast.units import first_few

# By which readers know a checkpoint, in the order in which they are written.
MARKERS = (
    "config.json",
    "model_config.json",
    "model.safetensors.index.json",
    "checkpoint_metadata.json",
    ".metadata",
)


class Upload:
    """A checkpoint that is written to a store, by all processes.

    Args:
        url: the folder in the store.
        overwrite: replace a checkpoint that is there.
    """

    def __init__(self, url: str, *, overwrite: bool) -> None:
        """Raises ConfigError, OSError."""
        self.store = Store.at(url)
        self._overwrite = overwrite
        # The first process's.
        self._claim = StoreClaim(self.store)
        self._before: dict[str, Version] = {}
        self._planned: Plan | None = None
        # What this process has begun to write, and what that was once it was written.
        self._begun: set[str] = set()
        self.written: dict[str, Version] = {}
        self._is_whole = False
        self._has_removed = False

    def check(self, ready: Plan, *, is_unfinished: bool | None = None) -> dict[str, Version]:
        """Raises DestinationError where something is in the way, and returns what is there.

        Args:
            is_unfinished: a run that has died was writing there; by default, whoever was writing
                there is asked later whether it lives.
        """
        found = self.store.files()
        names = {name: each for name, each in found.items() if not is_claim(name)}
        if is_unfinished is None:
            is_unfinished = len(names) < len(found)
            if is_unfinished and not self._overwrite:
                return names
        if not names:
            return names
        if not self._overwrite:
            raise DestinationError(
                f"{self.store.url}: it is not empty; --overwrite replaces what is there"
            )
        if self.store.url == _url_of(ready):
            raise DestinationError(f"{self.store.url}: the destination is the source")
        foreign = self._foreign(_known(ready), is_unfinished)
        if foreign:
            raise DestinationError(
                f"{self.store.url}: --overwrite replaces a checkpoint, and there is more in it: "
                f"{first_few(foreign)}; move that away, or choose another destination"
            )
        return names

    def _foreign(self, own: Collection[str], is_unfinished: bool) -> list[str]:
        seen = Mirror(self.store, with_tensors=False)
        try:
            names = sorted(os.listdir(seen.root))
            return foreign_names(seen.root, names, own, is_unfinished=is_unfinished)
        finally:
            seen.close()

    def begin(self, ready: Plan) -> None:
        """Claims the folder. From here on what was there is no checkpoint any more.

        So nobody takes it for one. Raises DestinationError where another run writes there, OSError.
        """
        self._claim.acquire()
        self._planned = ready
        self._before = self.check(ready, is_unfinished=self._claim.has_dead())
        for name in reversed(MARKERS):
            if self._before.pop(name, None) is not None:
                self._has_removed = True
                self.store.remove(name)

    def write_tensors(
        self,
        share: MovePlan,
        states: Mapping[Path, ReadFile],
        *,
        workers: int,
        on_progress: ProgressCallback | None = None,
    ) -> None:
        """Makes and uploads the files of this process, a group at a time.

        Raises what `running.execute` raises, OSError.
        """
        done = 0
        for group in groups_of(share, running.GROUP_BYTES, counts_outputs=True):
            with tempfile.TemporaryDirectory(prefix="nanotron_fast-upload-") as folder:
                running.check_room(Path(folder), group.plan.bytes_written)
                running.execute(
                    group.plan,
                    Path(folder),
                    workers=workers,
                    states={path: read.state for path, read in states.items()},
                )
                at_once(
                    (
                        partial(self._upload, Path(folder, each.path), each.path)
                        for each in group.plan.outputs
                    ),
                    running.behind(on_progress, done),
                )
            done += group.plan.bytes_written

    def _upload(self, path: Path, name: str) -> int:
        self._begun.add(name)
        self.written[name] = self.store.upload(path, name)
        return path.stat().st_size

    def finish(
        self, ready: Plan, written: Mapping[str, Version], states: Mapping[Path, ReadFile]
    ) -> None:
        """Writes the small files, the markers last, and removes what was there before.

        Args:
            written: what the files of all processes were once they were written.
            states: what the sources were.

        Raises DestinationError where something else is there; CheckpointError where a source has
        changed; OSError.
        """
        own = sorted(_small(ready), key=_order)
        for name in own:
            if name not in MARKERS:
                self._write(ready, name, states)
        check_unchanged(states)
        stale = self._check_own(ready, {**written, **self.written})
        for name in own:
            if name in MARKERS:
                self._write(ready, name, states)
        self._is_whole = True
        at_once(partial(_removed, self.store, name) for name in stale)
        self._claim.sweep()
        self._claim.release()

    def _write(self, ready: Plan, name: str, states: Mapping[Path, ReadFile]) -> None:
        self._begun.add(name)
        if name in ready.documents:
            self.written[name] = self.store.write(name, ready.documents[name]())
            return
        with tempfile.TemporaryDirectory(prefix="nanotron_fast-upload-") as folder:
            source, copy = ready.copies[name], Path(folder, "copy")
            copy_file(source, copy, states[source], fsync=False)
            self.written[name] = self.store.upload(copy, name)

    def _check_own(self, ready: Plan, written: Mapping[str, Version]) -> list[str]:
        """Proves that all is there as this run wrote it, and else only what was there before.

        Returns the names of what was there before. Raises DestinationError, OSError.
        """
        self._claim.check()
        found = {name: each for name, each in self.store.files().items() if not is_claim(name)}
        wanted = {each.path for each in ready.transfer.outputs} | (_small(ready) - set(MARKERS))
        missing = sorted(wanted - set(found))
        if missing:
            raise DestinationError(
                f"{self.store.url}: {first_few(missing)} of this run is not there any more: "
                "something else has removed it"
            )
        others = [name for name in found if name not in wanted]
        known = {name: written[name] for name in wanted}
        known |= {name: self._before[name] for name in others if name in self._before}
        changed = [name for name in found if name not in known]
        changed += self._changed(known, found)
        if changed:
            raise DestinationError(
                f"{self.store.url}: {first_few(sorted(changed))} was written by something else "
                "while this run wrote there"
            )
        return others

    def _changed(self, known: Mapping[str, Version], found: Mapping[str, Version]) -> list[str]:
        """The names of what is another version by now."""
        changed: list[str] = []

        def ask(name: str) -> int:
            # Listings may give times less exactly.
            now = found[name] if known[name].has_tag else self.store.version(name)
            if known[name].is_other(now):
                changed.append(name)
            return 0

        at_once(partial(ask, name) for name in known)
        return changed

    def abort(self, error: BaseException) -> str | None:
        """Removes what this process has uploaded, and says what is left.

        What a process that is gone has uploaded, it can remove no more: the first does so.
        """
        with ending():
            if self._is_whole:
                self._end(is_clean=True)
                return f"{self.store.url} is whole"
            has_lost_peer = isinstance(error, PeerGone) and self._planned is not None
            if has_lost_peer:
                self._adopt_all()
            left = [
                name
                for name in sorted(self._begun, key=_order, reverse=True)
                if not self._takes_back(name)
            ]
            # One that is gone from here may still be writing there.
            self._end(is_clean=not (left or self._has_removed or has_lost_peer))
            if left:
                return (
                    f"in {self.store.url} these are left: {first_few(left)}; --overwrite replaces "
                    "what a conversion has left"
                )
            if self._has_removed:
                return f"the checkpoint that was in {self.store.url} is not whole any more"
            return None

    def _adopt_all(self) -> None:
        """Takes for this process's own what lies there of the plan, and did not before."""
        with contextlib.suppress(OSError):  # what this process has written itself it knows
            for name, found in self.store.files().items():
                before = self._before.get(name)
                is_new = before is None or before.is_other(found)
                if self._planned is not None and name in _known(self._planned) and is_new:
                    self._begun.add(name)
                    self.written.setdefault(name, found)

    def _takes_back(self, name: str) -> bool:
        """Removes a file if this run wrote it. Returns whether nothing of this run is left."""
        try:
            now = self.store.version(name)
            wrote, before = self.written.get(name), self._before.get(name)
            if wrote is None:
                # The write has failed: nobody knows whose that is which is there all the same.
                return before is not None and not before.is_other(now)
            if wrote.is_other(now):
                return True  # somebody else has replaced it
            self.store.remove(name)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def _end(self, *, is_clean: bool) -> None:
        """Gives the claim up; where useless files lie there, the next run is to know that."""
        with contextlib.suppress(OSError):  # nothing is heard of it from now on
            if is_clean:
                self._claim.release()
            else:
                self._claim.leave()


def _known(ready: Plan) -> set[str]:
    return _small(ready) | {each.path for each in ready.transfer.outputs}


def _small(ready: Plan) -> set[str]:
    return {*ready.documents, *ready.copies}


def _order(name: str) -> tuple[int, str]:
    return (MARKERS.index(name) + 1 if name in MARKERS else 0, name)


def _removed(store: Store, name: str) -> int:
    store.remove(name)
    return 0


def _url_of(ready: Plan) -> str | None:
    from nanotron_fast.checkpoints.remote.mirror import mirror_of

    found = mirror_of(ready.source)
    return None if found is None else found[0].store.url


def upload(
    make_plan: Callable[[], Plan],
    url: str,
    *,
    overwrite: bool,
    workers: int,
    check: Callable[[Plan], None],
    on_plan: Callable[[Plan], None] | None,
    on_total: Callable[[int], None] | None,
    on_progress: ProgressCallback | None,
    processes: Processes,
) -> tuple[Plan, str, float]:
    """Carries out a plan of every process into a store.

    Args:
        make_plan: makes it, the same on every process.
        url: the folder in the store, which appears with its last file.
        overwrite: replace a checkpoint that is there. It is lost where something fails.
        workers: threads of the engine.
        check: is called on the first process with the plan, before anything is written.
        on_plan, on_total, on_progress, processes: as for `convert`.

    Returns:
        The plan, the URL as messages show it, and the seconds that the tensor files took.

    Raises:
        What `make_plan`, `check` and `running.execute` raise; DestinationError where something is
        in the way; OSError where the store refuses.
    """
    target: Upload | None = None
    with _telling(lambda error: None if target is None else target.abort(error)):
        with processes.step():
            ready = make_plan()
            target = Upload(url, overwrite=overwrite)
            states = states_of(ready)
            made = made_by(ready, states)
        with processes.step():
            check_same(processes, made)
        with processes.step():
            if processes.rank == 0:
                target.check(ready)
                check(ready)
                if on_plan is not None:
                    on_plan(ready)
                target.begin(ready)
        started = time.perf_counter()
        with processes.step():
            share = ready.transfer.share(processes.rank, processes.world_size)
            if on_total is not None:
                on_total(share.bytes_written)
            target.write_tensors(share, states, workers=workers, on_progress=on_progress)
        seconds = time.perf_counter() - started
        written: dict[str, Version] = {}
        for each in processes.gather(target.written):
            written |= each
        with processes.step():
            if processes.rank == 0:
                target.finish(ready, written, states)
    return ready, target.store.url, seconds


@contextlib.contextmanager
def _telling(abort: Callable[[BaseException], str | None]) -> Iterator[None]:
    """Cleans up after an error or a signal, and says with it what is left in the store."""
    try:
        yield
    except Interrupted as interruption:
        interruption.remains = abort(interruption)
        raise
    except BaseException as error:
        remains = abort(error)
        if remains is not None and isinstance(error, OSError) and error.strerror:
            error.strerror = f"{error.strerror}; {remains}"
        elif remains is not None and isinstance(error, NanotronFastError):
            error.args = (f"{error}; {remains}",)
        raise
