"""Checksums that stand in a file beside what they are of: the CRC-32 of a zip file's records.

They can be known only when the bytes are there, so they are written when a file is whole.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from nanotron_fast.moves.files import Folder

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Checksum:
    """A CRC-32 that stands in a file: of which of its bytes, and where, little-endian."""

    begin_bytes: int
    num_bytes: int
    at: tuple[int, ...]


def write_checksums(
    folder: Folder, path: str, checksums: Sequence[Checksum], *, workers: int, fsync: bool
) -> None:
    """Computes and writes the checksums of a file that is whole but for them.

    Args:
        folder, path: the file, relative to the folder.
        checksums: of it.
        workers: threads.
        fsync: return when the device has them.

    Raises OSError, which names the file.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = -1
    try:
        descriptor = os.open(path, flags, dir_fd=folder.descriptor)
        if workers > 1 and len(checksums) > 1:
            from concurrent.futures import ThreadPoolExecutor

            pool = ThreadPoolExecutor(workers)
            try:
                list(pool.map(lambda each: _write(descriptor, each), checksums))
            finally:
                pool.shutdown(cancel_futures=True)
        else:
            for each in checksums:
                _write(descriptor, each)
        if fsync:
            os.fsync(descriptor)
    except OSError as error:
        error.filename = error.filename or os.fspath(folder.path / path)
        raise
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _write(descriptor: int, checksum: Checksum) -> None:
    value, at = 0, checksum.begin_bytes
    end = at + checksum.num_bytes
    while at < end:
        block = os.pread(descriptor, min(_BLOCK_BYTES, end - at), at)
        if not block:
            raise OSError(f"the file ends at byte {at}, and should have {end}")
        value = zlib.crc32(block, value)
        at += len(block)
    data = value.to_bytes(4, "little")
    for place in checksum.at:
        if os.pwrite(descriptor, data, place) != len(data):
            raise OSError(f"a checksum could not be written at byte {place}")
