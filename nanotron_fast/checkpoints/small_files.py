"""Writing the small files beside the weights: each error names the file that could not be written.

The space on a disk runs out within a `write`, which knows no name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanotron_fast.formats.plain_file import changed, check_plain, open_plain
from nanotron_fast.moves.files import Folder, ReadFile

_BLOCK_BYTES = 1 << 20


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An error of what is done to an open file names the file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def write_all(descriptor: int, data: bytes, path: str | Path) -> None:
    """Writes all of it to a file that is open. Raises OSError, which names it."""
    view = memoryview(data)
    with naming(path):
        while view:
            view = view[os.write(descriptor, view) :]


def sync(path: Path) -> None:
    """Returns when a file, or a folder's list of names, is on the device. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _writing(path: Path, within: Folder | None, *, fsync: bool) -> Iterator[int]:
    name = path if within is None else within.path / path
    if within is None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    else:
        descriptor = within.create(os.fspath(path))
    with naming(name):
        try:
            yield descriptor
            if fsync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_file(path: Path, data: bytes, *, fsync: bool, within: Folder | None = None) -> None:
    """Writes a small file; within a folder that is held open, one that was not there.

    Raises OSError, which names it.
    """
    with _writing(path, within, fsync=fsync) as descriptor:
        write_all(descriptor, data, path if within is None else within.path / path)


def copy_file(
    source: Path,
    destination: Path,
    then: ReadFile,
    *,
    fsync: bool,
    within: Folder | None = None,
) -> None:
    """Copies a plain file; see `write_file`.

    `then` is what it was when the plan was made. What has been copied must be that: the file may be
    written anew meanwhile, and hold the same before and after.

    Raises CheckpointError where it is not, and OSError.
    """
    check_plain(source)
    name = destination if within is None else within.path / destination
    digest, copied = hashlib.sha256(), 0
    with open_plain(source) as reader, _writing(destination, within, fsync=fsync) as writer:
        while block := reader.read(_BLOCK_BYTES):
            copied += len(block)
            if copied > then.state.size_bytes:
                break
            digest.update(block)
            write_all(writer, block, name)
    if digest.hexdigest() != then.header_digest or copied != then.state.size_bytes:
        raise changed(source, then.state.size_bytes, copied)
