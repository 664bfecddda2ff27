"""Carrying a plan out into a store: whole files, a few at a time, what marks a checkpoint last.

A store has no folder that could be renamed. So tensor files are made in a temporary folder, group
by group, and uploaded; then come the small files, and last the one by which readers know a whole
checkpoint. What was uploaded is removed when something fails.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from nanotron_fast.checkpoints.plan.plan import Plan
from nanotron_fast.checkpoints.processes import Processes
from nanotron_fast.checkpoints.remote import running
from nanotron_fast.checkpoints.remote.mirror import Mirror
from nanotron_fast.checkpoints.remote.store import Store, at_once
from nanotron_fast.errors import DestinationError, NanotronFastError
from nanotron_fast.formats.known_files import foreign_names
from nanotron_fast.interruption import Interrupted, ending
from nanotron_fast.moves.engine import ProgressCallback
from nanotron_fast.moves.groups import groups_of
from nanotron_fast.moves.plan import MovePlan

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
        self._begun: set[str] = set()
        self._is_whole = False
        self._has_removed = False

    def check(self, ready: Plan) -> None:
        """Raises DestinationError where something is in the way."""
        names = set(self.store.files())
        if not names:
            return
        if not self._overwrite:
            raise DestinationError(
                f"{self.store.url}: it is not empty; --overwrite replaces what is there"
            )
        if self.store.url == _url_of(ready):
            raise DestinationError(f"{self.store.url}: the destination is the source")
        foreign = self._foreign(_small(ready))
        if foreign:
            more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
            raise DestinationError(
                f"{self.store.url}: --overwrite replaces a checkpoint, and there is more in it: "
                f"{', '.join(foreign[:5])}{more}; move that away, or choose another destination"
            )

    def _foreign(self, own: Collection[str]) -> list[str]:
        seen = Mirror(self.store, with_tensors=False)
        try:
            return foreign_names(seen.root, sorted(os.listdir(seen.root)), own)
        finally:
            seen.close()

    def begin(self) -> None:
        """From here on what was there is no checkpoint any more, so that nobody takes it for one.

        Raises OSError.
        """
        found = self.store.files(in_folders=False)
        for name in reversed(MARKERS):
            if name in found:
                self._has_removed = True
                self.store.remove(name)

    def write_tensors(
        self,
        share: MovePlan,
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
                running.execute(group.plan, Path(folder), workers=workers)
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
        self.store.upload(path, name)
        return path.stat().st_size

    def finish(self, ready: Plan) -> None:
        """Writes the small files, the markers last, and removes what was there before.

        Raises OSError.
        """
        own = _small(ready)
        for name in sorted(own, key=_order):
            self._begun.add(name)
            if name in ready.documents:
                self.store.write(name, ready.documents[name]())
            else:
                self.store.upload(ready.copies[name], name)
        self._is_whole = True
        if self._overwrite:
            known = own | {each.path for each in ready.transfer.outputs}
            stale = [name for name in self.store.files() if name not in known]
            at_once(partial(_removed, self.store, name) for name in stale)

    def abort(self) -> str | None:
        """Removes what this process has uploaded, and says what is left."""
        with ending():
            if self._is_whole:
                return f"{self.store.url} is whole"
            left: list[str] = []
            for name in sorted(self._begun, key=_order, reverse=True):
                try:
                    self.store.remove(name)
                except OSError:
                    left.append(name)
            if left:
                more = f" and {len(left) - 5} more" if len(left) > 5 else ""
                return f"in {self.store.url} these are left: {', '.join(left[:5])}{more}"
            if self._has_removed:
                return f"the checkpoint that was in {self.store.url} is not whole any more"
            return None


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
    with _telling(lambda: None if target is None else target.abort()):
        with processes.step():
            ready = make_plan()
            target = Upload(url, overwrite=overwrite)
            if processes.rank == 0:
                target.check(ready)
                check(ready)
                if on_plan is not None:
                    on_plan(ready)
                target.begin()
        started = time.perf_counter()
        with processes.step():
            share = ready.transfer.share(processes.rank, processes.world_size)
            if on_total is not None:
                on_total(share.bytes_written)
            target.write_tensors(share, workers=workers, on_progress=on_progress)
        seconds = time.perf_counter() - started
        with processes.step():
            if processes.rank == 0:
                target.finish(ready)
    return ready, target.store.url, seconds


@contextmanager
def _telling(abort: Callable[[], str | None]) -> Iterator[None]:
    """Cleans up after an error or a signal, and says with it what is left in the store."""
    try:
        yield
    except Interrupted as interruption:
        interruption.remains = abort()
        raise
    except BaseException as error:
        remains = abort()
        if remains is not None and isinstance(error, OSError) and error.strerror:
            error.strerror = f"{error.strerror}; {remains}"
        elif remains is not None and isinstance(error, NanotronFastError):
            error.args = (f"{error}; {remains}",)
        raise
