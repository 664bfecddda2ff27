"""Writing the small files beside the weights: each error names the file that could not be written.

The space on a disk runs out within a `write`, which knows no name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.plain_file import check_plain, open_plain
from nanotron_fast.moves.files import Folder

_BLOCK_BYTES = 1 << 20


@contextmanager
def _writing(path: Path, within: Folder | None, *, fsync: bool) -> Iterator[BinaryIO]:
    opener = None if within is None else lambda *_: within.create(os.fspath(path))
    name = path if within is None else within.path / path
    try:
        with open(name, "wb", buffering=0, opener=opener) as file:
            yield file
            if fsync:
                os.fsync(file.fileno())
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(name)
        raise


def _write(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def write_file(path: Path, data: bytes, *, fsync: bool, within: Folder | None = None) -> None:
    """Writes a small file; within a folder that is held open, one that was not there.

    Raises OSError, which names it.
    """
    with _writing(path, within, fsync=fsync) as file:
        _write(file, data)


def copy_file(
    source: Path, destination: Path, *, fsync: bool, within: Folder | None = None
) -> None:
    """Copies as many bytes as a plain file says that it holds; see `write_file`.

    Raises CheckpointError where it holds fewer or is not one, and OSError.
    """
    check_plain(source)
    with open_plain(source) as reader, _writing(destination, within, fsync=fsync) as writer:
        left = os.fstat(reader.fileno()).st_size
        while left:
            block = reader.read(min(left, _BLOCK_BYTES))
            if not block:
                raise CheckpointError(f"{source}: it ends {left} bytes before its size")
            _write(writer, block)
            left -= len(block)
