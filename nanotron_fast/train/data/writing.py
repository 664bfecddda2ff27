"""Token files written beside each other, and folders that are whole or not there."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from nanotron_fast.checkpoints.small_files import naming, sync
from nanotron_fast.errors import DataError
from nanotron_fast.interruption import ending, held
from nanotron_fast.train.data.encode import Encoded
from nanotron_fast.train.data.nanoset import INDEX_DTYPE, TOKEN_DTYPES


class TokenWriter:
    """One .ds file, its index, and what each token counts for where that is asked for.

    Its methods raise OSError, which names the file.
    """

    def __init__(self, path: Path, token_size: int) -> None:
        self.path = path
        self.num_tokens = 0
        self.num_documents = 0
        self._dtype = TOKEN_DTYPES[token_size]
        self._streams: dict[str, BinaryIO] = {}

    def __enter__(self) -> TokenWriter:
        self._append("", b"")
        self._append(".index", b"")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with ExitStack() as stack:
            if kind is not None:
                # What cannot be written now is the error that is under way already.
                stack.enter_context(suppress(OSError))
            for suffix in self._streams:
                stack.callback(self._close, suffix)

    def _append(self, suffix: str, data: bytes) -> None:
        name = f"{self.path}{suffix}"
        if suffix not in self._streams:
            self._streams[suffix] = open(name, "wb")  # noqa: SIM115
        with naming(name):
            self._streams[suffix].write(data)

    def _close(self, suffix: str) -> None:
        """Writes what is left in memory."""
        with naming(f"{self.path}{suffix}"):
            self._streams[suffix].close()

    def write(self, encoded: Encoded) -> None:
        """Appends a block."""
        self._append("", encoded.tokens.astype(self._dtype).tobytes())
        self._append(".index", (encoded.ends + self.num_tokens).astype(INDEX_DTYPE).tobytes())
        if encoded.is_learned is not None:
            self._append(".learned", encoded.is_learned.astype(np.uint8).tobytes())
        self.num_tokens += len(encoded.tokens)
        self.num_documents += len(encoded.ends)


@contextmanager
def whole_folder(path: Path, *, yields: bool = False) -> Iterator[Path]:
    """A folder to write to, which takes the name `path` at the end, and is gone after an error.

    It has a name of its own until then, so that two processes are safe from each other on file
    systems without locks, too.

    Args:
        path: what there may be no more of than an empty folder.
        yields: where another process was quicker, its folder stays, and this one is thrown away.

    Raises DataError where there is something under the name, or another process makes it so.
    """
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_left(path)
    partial = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    partial.mkdir()
    try:
        with locked(partial, waits=False):
            yield partial
            for each in sorted(partial.iterdir()):
                sync(each)
            sync(partial)
            with held():
                try:
                    # An empty folder gives way to it.
                    partial.rename(path)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    if not yields:
                        raise DataError(f"{path}: another process has written it") from error
                    shutil.rmtree(partial)
            sync(path.parent)
    except BaseException:
        with ending():
            shutil.rmtree(partial, ignore_errors=True)
        raise


def check_free(path: Path) -> None:
    """Raises DataError where there is something under a name."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        what = "it is not empty" if path.is_dir() else "it is there, and is no folder"
        raise DataError(f"{path}: {what}; choose another name, or move it away")


def _clear_left(path: Path) -> None:
    """Removes what killed processes have left that were to make the same folder.

    Raises DataError where one is still at it. Without locks that cannot be told, and all stays.
    """
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        with suppress(FileNotFoundError), locked(left, waits=False) as has_lock:
            if has_lock:
                shutil.rmtree(left)


@contextmanager
def locked(path: Path, *, waits: bool) -> Iterator[bool]:
    """Keeps other processes out of a file or a folder; False where the file system has no locks.

    The lock ends with the process, however that ends. Raises DataError where another process has it
    and `waits` is false.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        has_lock = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            raise DataError(f"{path}: another process is writing it") from None
        except OSError:
            has_lock = False
        yield has_lock
    finally:
        os.close(descriptor)
