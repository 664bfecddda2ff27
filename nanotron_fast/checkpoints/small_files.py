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

_BLOCK_BYTES = 1 << 20


@contextmanager
def _writing(path: Path, *, fsync: bool) -> Iterator[BinaryIO]:
    try:
        with open(path, "wb", buffering=0) as file:
            yield file
            if fsync:
                os.fsync(file.fileno())
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def _write(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def write_file(path: Path, data: bytes, *, fsync: bool) -> None:
    """Writes a small file. Raises OSError, which names it."""
    with _writing(path, fsync=fsync) as file:
        _write(file, data)


def copy_file(source: Path, destination: Path, *, fsync: bool) -> None:
    """Copies as many bytes as a plain file says that it holds.

    Raises CheckpointError where it holds fewer or is not one, and OSError.
    """
    check_plain(source)
    with open_plain(source) as reader, _writing(destination, fsync=fsync) as writer:
        left = os.fstat(reader.fileno()).st_size
        while left:
            block = reader.read(min(left, _BLOCK_BYTES))
            if not block:
                raise CheckpointError(f"{source}: it ends {left} bytes before its size")
            _write(writer, block)
            left -= len(block)
