"""A folder that is held open while it is written to, and what a file is when a plan is made."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class FileState(NamedTuple):
    """What tells a file from another one under its name, and from itself before it was written to.

    The order is that of the native engine.
    """

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        """What `os.stat` says."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class ReadFile:
    """What a file was when its header was read, and a digest of that header; maybe none: "".

    `is_whole`: it is a small file, and the digest is of all of it.
    """

    state: FileState
    header_digest: str
    is_whole: bool = False


@dataclass(slots=True)
class Folder:
    """A folder by its descriptor: what is done in it is done there, whoever takes its name.

    Args:
        path: for messages.
        descriptor: open until `close`.
    """

    path: Path
    descriptor: int

    @classmethod
    def open(cls, path: Path, *, within: Folder | None = None) -> Folder:
        """Opens a folder, and no link to one. Raises OSError.

        Args:
            path: from the current folder, or a name in `within`.
        """
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        if within is None:
            return cls(path, os.open(path, flags))
        descriptor = os.open(path, flags | os.O_NOFOLLOW, dir_fd=within.descriptor)
        return cls(within.path / path, descriptor)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of it. May be called again."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def make_folders(self, paths: Iterable[str]) -> None:
        """Makes folders in it, and those that they lie in, by paths from it. Raises OSError."""
        made = {""}
        for path in sorted(paths):
            parts = path.split("/")
            for depth in range(1, len(parts) + 1):
                name = "/".join(parts[:depth])
                if name in made:
                    continue
                made.add(name)
                try:
                    os.mkdir(name, dir_fd=self.descriptor)
                except FileExistsError:
                    pass
                except OSError as error:
                    error.filename = os.fspath(self.path / name)
                    raise

    def create(self, path: str) -> int:
        """A descriptor of a file that was not there, to write to. Raises OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(path, flags, 0o666, dir_fd=self.descriptor)
        except OSError as error:
            error.filename = os.fspath(self.path / path)
            raise

    def make_hollow(self, path: str, size_bytes: int) -> None:
        """Makes a file of that size that was not there, and the folders that it lies in.

        All of it is a hole, which others fill. Raises OSError.
        """
        self.make_folders({os.path.dirname(path)})
        descriptor = self.create(path)
        try:
            os.ftruncate(descriptor, size_bytes)
        except OSError as error:
            error.filename = os.fspath(self.path / path)
            raise
        finally:
            os.close(descriptor)

    def sync(self, path: str) -> None:
        """Returns when a file in it is on the device. Raises OSError."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, dir_fd=self.descriptor)
        try:
            os.fsync(descriptor)
        except OSError as error:
            error.filename = os.fspath(self.path / path)
            raise
        finally:
            os.close(descriptor)

    def _is_folder(self, path: str) -> bool:
        status = os.stat(path, dir_fd=self.descriptor, follow_symlinks=False)
        return stat.S_ISDIR(status.st_mode)

    def size_of(self, path: str) -> int | None:
        """Bytes of a plain file in it; None where there is none, or where a link leads to it."""
        try:
            for at, letter in enumerate(path):
                if letter == "/" and not self._is_folder(path[:at]):
                    return None
            status = os.stat(path, dir_fd=self.descriptor, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None
