"""A directory that is either whole or not there.

Everything is written to a sibling, `DST.partial`, and renamed when it is done. A lock in that
sibling tells a run that is still going from one that was killed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path

from nanotron_fast.errors import DestinationError

_LOCK = ".nanotron_fast.lock"


class Destination:
    """Where a conversion's result will be."""

    def __init__(self, path: Path, *, source: Path, overwrite: bool) -> None:
        """Checks that nothing would be lost. Raises DestinationError."""
        self.path = Path(os.path.realpath(path))
        if not self.path.name:
            raise DestinationError(f"{path}: the root of the file system cannot be a destination")
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._overwrite = overwrite
        self._lock: int | None = None
        # The nearest folder above that was there before.
        self._oldest_parent = self.path.parent
        source = Path(os.path.realpath(source))
        if self.path == source:
            raise DestinationError(f"{path}: the destination is the source")
        if source in self.path.parents:
            raise DestinationError(f"{path}: the destination lies inside the source {source}")
        if self.path in source.parents:
            raise DestinationError(f"{path}: the source {source} lies inside the destination")
        self.check()

    def check(self) -> None:
        """Raises DestinationError where something is in the way."""
        if self.path.exists() and not self.path.is_dir():
            raise DestinationError(f"{self.path}: it is there, and is not a directory")
        if self.path.is_dir() and any(self.path.iterdir()) and not self._overwrite:
            raise DestinationError(
                f"{self.path}: it is not empty; --overwrite replaces it once the new one is whole"
            )

    def check_space(self, num_bytes: int) -> None:
        """Raises DestinationError where the file system has less room than this."""
        folder = self.path.parent
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if num_bytes > free:
            raise DestinationError(
                errno.ENOSPC,
                f"the conversion writes {num_bytes:,} bytes, and {free:,} are free",
                str(self.path),
            )

    def open(self) -> Path:
        """Makes the empty directory to write to, and returns it. Raises DestinationError."""
        if self.partial.exists():
            self._take_over()
            shutil.rmtree(self.partial)
            self._release()
        while not self._oldest_parent.exists():
            self._oldest_parent = self._oldest_parent.parent
        self.partial.mkdir(parents=True)
        self._acquire()
        return self.partial

    def _take_over(self) -> None:
        if not (self.partial / _LOCK).is_file():
            raise DestinationError(
                f"{self.partial}: it is there, and no conversion left it; move it away"
            )
        self._acquire()

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

    def commit(self, *, fsync: bool) -> None:
        """Gives the result its name. What `overwrite` replaces is there until then."""
        if fsync:
            for folder, _, _ in os.walk(self.partial):
                _sync_directory(Path(folder))
        replaced = self.path.with_name(f"{self.path.name}.replaced-{os.getpid()}")
        self.check()
        try:
            if self.path.is_dir() and any(self.path.iterdir()):
                self.path.rename(replaced)
            # As late as can be: a killed run that has lost its lock looks like another's folder.
            (self.partial / _LOCK).unlink()
            self.partial.rename(self.path)
        except BaseException:
            if replaced.exists() and not self.path.exists():
                replaced.rename(self.path)
            raise
        if fsync:
            parent = self.path.parent
            while parent != self._oldest_parent:
                _sync_directory(parent)
                parent = parent.parent
            _sync_directory(parent)
        if replaced.exists():
            shutil.rmtree(replaced)
        self._release()

    def abort(self) -> None:
        """Removes what was written so far."""
        if self._lock is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            self._release()


def write_file(path: Path, data: bytes, *, fsync: bool) -> None:
    """Writes a small file."""
    with open(path, "wb") as file:
        file.write(data)
        if fsync:
            file.flush()
            os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
