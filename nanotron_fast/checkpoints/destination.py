"""A directory that is either whole or not there.

Everything is written to a folder for the time being, and takes its place when it is done: beside
the destination and renamed as a whole, or, where the destination is there already, within it. That
directory stays then, with its owner, mode and access lists, and may be a mount point or lie in a
parent that cannot be written to; the parts move up one by one, the one that marks a whole
checkpoint last. A lock in the folder tells a run that is still going from one that was killed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from nanotron_fast.errors import DestinationError
from nanotron_fast.formats.known_files import MARKERS, foreign_names
from nanotron_fast.formats.known_files import OURS as _OURS
from nanotron_fast.interruption import ending, held

_LOCK = ".nanotron_fast.lock"
_INSIDE = f"{_OURS}partial"


class Destination:
    """Where a conversion's result will be."""

    def __init__(
        self, path: Path, *, source: Path, overwrite: bool, inputs: Iterable[Path] = ()
    ) -> None:
        """Checks that nothing of `source`, or of what else is read, would be lost.

        Raises DestinationError.
        """
        self.path = Path(os.path.realpath(path))
        if not self.path.name:
            raise DestinationError(f"{path}: the root of the file system cannot be a destination")
        self.is_inside = self.path.exists()
        self.partial = (
            self.path / _INSIDE
            if self.is_inside
            else self.path.with_name(self.path.name + ".partial")
        )
        self._overwrite = overwrite
        self._lock: int | None = None
        self._is_begun = self._is_whole = False
        self._replaced = self.path / f"{_OURS}replaced-{os.getpid()}"
        # The nearest folder above that was there before.
        self._oldest_parent = self.path.parent
        while not self._oldest_parent.exists():
            self._oldest_parent = self._oldest_parent.parent
        self._check_apart(path, Path(os.path.realpath(source)), inputs)
        if self.path.exists() and not self.path.is_dir():
            raise DestinationError(f"{self.path}: it is there, and is not a directory")

    def _check_apart(self, path: Path, source: Path, inputs: Iterable[Path]) -> None:
        """Compares places, by name and by inode: one folder may be mounted in several places."""
        where, beside = _identities(self.path), self.path.with_name(self.path.name + ".partial")
        for place in dict.fromkeys((source, *(Path(os.path.realpath(each)) for each in inputs))):
            above = _identities(place)
            what = f"the source {place}" if place == source else f"{place}, which is read,"
            if place == source and where[:1] == above[:1]:
                raise DestinationError(f"{path}: the destination is the source")
            if place == source and above[0] in where:
                raise DestinationError(f"{path}: the destination lies inside {what}")
            if where[0] in above:
                raise DestinationError(f"{path}: {what} lies inside the destination")
            if not self.is_inside and beside.exists() and _identities(beside)[0] in above:
                raise DestinationError(
                    f"{path}: {what} lies in {beside}, which is where the conversion would write; "
                    "give that another name"
                )

    def check(self, names: Collection[str] = ()) -> None:
        """Raises DestinationError where something is in the way.

        `names` are paths of the new result's files: what is replaced by its like is not lost.
        """
        if self.path.exists() and not self.path.is_dir():
            raise DestinationError(f"{self.path}: it is there, and is not a directory")
        found = self._entries()
        if found and not self._overwrite:
            raise DestinationError(
                f"{self.path}: it is not empty; --overwrite replaces it once the new one is whole"
            )
        foreign = foreign_names(self.path, found, names) if found else []
        if foreign:
            shown = ", ".join(foreign[:5])
            more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
            raise DestinationError(
                f"{self.path}: --overwrite replaces a checkpoint, and there is more in it: "
                f"{shown}{more}; move that away, or choose another destination"
            )

    def _entries(self) -> list[str]:
        """What is in the destination, but for what a killed run has left there."""
        if not self.path.is_dir():
            return []
        left = {_INSIDE, *self._moved_by_killed_run()} if self.is_inside else set()
        return sorted(name for name in os.listdir(self.path) if name not in left)

    def _moved_by_killed_run(self) -> list[str]:
        """Parts that a run had moved up when it was killed, before it had moved them all."""
        partial = self.path / _INSIDE
        try:
            names = json.loads((partial / _LOCK).read_bytes() or b"[]")
        except (OSError, ValueError):  # no killed run, or it had not come so far
            return []
        if not isinstance(names, list) or not all(
            isinstance(name, str) and Path(name).name == name for name in names
        ):
            return []
        waiting = [name for name in names if os.path.lexists(partial / name)]
        return [name for name in names if name not in waiting] if waiting else []

    def open(self, sizes: Iterable[int] = (), names: Collection[str] = ()) -> Path:
        """Makes the empty directory to write to, and returns it.

        Args:
            sizes: of the files that will be written, in bytes.
            names: paths of the small files of the result.

        Raises:
            DestinationError: something is in the way, or the file system has no room for that.
            OSError: it cannot be written to.
        """
        self.check(names)
        with held():
            self._clear_stale()
            try:
                self.partial.parent.mkdir(parents=True, exist_ok=True)
                self.partial.mkdir()
            except OSError as error:
                self._remove_parents()
                reason = f"it cannot be written: {error.strerror}"
                raise DestinationError(error.errno, reason, str(self.path)) from error
            self._is_begun = True
            self._acquire()
        self._check_space(list(sizes))
        return self.partial

    def _clear_stale(self) -> None:
        """Removes what a killed run has left."""
        if not os.path.lexists(self.partial):
            return
        is_ours = self.partial.is_dir() and not self.partial.is_symlink()
        is_empty = is_ours and not os.listdir(self.partial)
        if not is_ours or not (is_empty or (self.partial / _LOCK).is_file()):
            raise DestinationError(
                f"{self.partial}: it is there, and no conversion left it; move it away"
            )
        self._acquire()
        for name in self._moved_by_killed_run() if self.is_inside else ():
            _remove(self.path / name)
        shutil.rmtree(self.partial)
        self._release()

    def _acquire(self) -> None:
        self._lock = os.open(self.partial / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._release()
            raise DestinationError(f"{self.partial}: another conversion is writing to it") from None
        except OSError:
            pass  # a file system without locks: go on without telling runs apart

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_space(self, sizes: list[int]) -> None:
        """Compares whole blocks, which are what files take, and the number of files."""
        room = os.statvfs(self.partial)
        block = room.f_frsize or room.f_bsize or 1
        needed = sum(-(-size // block) * block for size in sizes)
        free = room.f_bavail * block
        if needed > free:
            raise DestinationError(
                errno.ENOSPC,
                f"the conversion writes {needed:,} bytes in blocks of {block:,}, and {free:,} "
                "are free",
                str(self.path),
            )
        # Some file systems have no limit, and say 0.
        if room.f_files and len(sizes) > room.f_favail:
            raise DestinationError(
                errno.ENOSPC,
                f"the conversion writes {len(sizes):,} files, and the file system has room for "
                f"{room.f_favail:,}",
                str(self.path),
            )

    def commit(self, *, fsync: bool, names: Collection[str] = ()) -> None:
        """Gives the result its name. What `overwrite` replaces is there until then."""
        if fsync:
            for folder, _, _ in os.walk(self.partial):
                _sync_directory(Path(folder))
        with held():
            self.check(names)
            if self.is_inside:
                self._move_up(fsync)
            else:
                self._rename()
            self._is_whole = True
        if fsync:
            parent = self.path if self.is_inside else self.path.parent
            while parent != self._oldest_parent:
                _sync_directory(parent)
                parent = parent.parent
            _sync_directory(parent)
        if self.is_inside:
            _remove(self._replaced)
            _remove(self.partial)
        self._release()

    def _rename(self) -> None:
        # As late as can be: a killed run that has lost its lock looks like another's folder.
        (self.partial / _LOCK).unlink()
        self.partial.rename(self.path)

    def _move_up(self, fsync: bool) -> None:
        """Moves what was there aside, and the parts up; on an error, all of it back."""
        before = self._entries()
        parts = sorted(set(os.listdir(self.partial)) - {_LOCK}, key=_order)
        assert self._lock is not None
        os.pwrite(self._lock, json.dumps(parts).encode(), 0)
        done: list[tuple[Path, Path]] = []
        try:
            if before:
                self._replaced.mkdir()
            for name in before:
                done.append(_move(self.path / name, self._replaced / name))
            for name in parts:
                if fsync and name == parts[-1]:
                    _sync_directory(self.path)
                done.append(_move(self.partial / name, self.path / name))
        except BaseException:
            for there, here in reversed(done):
                here.rename(there)
            if self._replaced.exists():
                self._replaced.rmdir()
            raise

    def abort(self) -> None:
        """Removes what was written so far."""
        with ending():
            if self._is_begun:
                if not self._is_whole:
                    shutil.rmtree(self.partial, ignore_errors=True)
                    self._remove_parents()
                self._release()

    def _remove_parents(self) -> None:
        """Those that were made for this result, where nobody else has put anything into them."""
        parent = self.path.parent
        while parent != self._oldest_parent:
            try:
                parent.rmdir()
            except OSError:
                return
            parent = parent.parent

    def remains(self) -> str:
        """What is there after an end before time, in words."""
        state = "is whole" if self._is_whole else "is as it was"
        left = [path for path in (self.partial, self._replaced) if self._is_begun and path.exists()]
        more = f", and {' and '.join(map(str, left))} can be deleted" if left else ""
        return f"{self.path} {state}{more}"


def _identities(path: Path) -> list[tuple[int, int] | Path]:
    """A path and all that it lies in: device and inode, or the name of what is not there."""
    found: list[tuple[int, int] | Path] = []
    for each in (path, *path.parents):
        try:
            status = os.stat(each)
        except OSError:
            found.append(each)
        else:
            found.append((status.st_dev, status.st_ino))
    return found


def _order(name: str) -> tuple[int, str]:
    """Weights and what goes with them first, the marks of a whole checkpoint last."""
    return (MARKERS.index(name) + 1 if name in MARKERS else 0, name)


def _move(here: Path, there: Path) -> tuple[Path, Path]:
    here.rename(there)
    return here, there


def _remove(path: Path) -> None:
    """Removes a file or a folder, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
