"""Token files written beside each other, and folders that are whole or not there."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from nanotron_fast.errors import DataError
from nanotron_fast.interruption import ending, held
from nanotron_fast.train.data.encode import Encoded
from nanotron_fast.train.data.nanoset import INDEX_DTYPE, TOKEN_DTYPES


class TokenWriter:
    """One .ds file, its index, and what each token counts for where that is asked for."""

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
            for stream in self._streams.values():
                stack.callback(stream.close)

    def _append(self, suffix: str, data: bytes) -> None:
        if suffix not in self._streams:
            self._streams[suffix] = open(f"{self.path}{suffix}", "wb")  # noqa: SIM115
        self._streams[suffix].write(data)

    def write(self, encoded: Encoded) -> None:
        """Appends a block."""
        self._append("", encoded.tokens.astype(self._dtype).tobytes())
        self._append(".index", (encoded.ends + self.num_tokens).astype(INDEX_DTYPE).tobytes())
        if encoded.is_learned is not None:
            self._append(".learned", encoded.is_learned.astype(np.uint8).tobytes())
        self.num_tokens += len(encoded.tokens)
        self.num_documents += len(encoded.ends)


def sync(path: Path) -> None:
    """Returns when a file, or a folder's list of names, is on the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, which takes the name `path` at the end, and is gone after an error.

    Raises DataError where there is something under that name, or another process writes it.
    """
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with _locked_folder(partial):
        try:
            for left in partial.iterdir():
                # The lock is ours, so this is of a process that was killed.
                left.unlink()
            yield partial
            for each in sorted(partial.iterdir()):
                sync(each)
            sync(partial)
            with held():
                # An empty folder gives way to it.
                partial.rename(path)
        except BaseException:
            with ending():
                shutil.rmtree(partial, ignore_errors=True)
            raise
        sync(path.parent)


def check_free(path: Path) -> None:
    """Raises DataError where there is something under a name."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        what = "it is not empty" if path.is_dir() else "it is there, and is no folder"
        raise DataError(f"{path}: {what}; choose another name, or move it away")


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """Makes a folder where there is none, and keeps other processes out of it."""
    while True:
        folder.mkdir(exist_ok=True)
        with locked(folder, waits=False) as descriptor:
            try:
                is_same = os.path.samestat(os.stat(folder), os.fstat(descriptor))
            except FileNotFoundError:
                is_same = False
            if not is_same:
                continue  # Another process has given it its name just now.
            yield
            return


@contextmanager
def locked(path: Path, *, waits: bool) -> Iterator[int]:
    """Keeps other processes out of a file or a folder, and gives its descriptor.

    The lock ends with the process, however that ends. Raises DataError where another process has it
    and `waits` is false.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            raise DataError(f"{path}: another process is writing it") from None
        except OSError:
            pass  # A file system without locks: the rename alone keeps the result whole.
        yield descriptor
    finally:
        os.close(descriptor)
