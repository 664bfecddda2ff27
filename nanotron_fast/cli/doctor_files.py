"""What a file system can do for checkpoints: asked of a file that has no name."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nanotron_fast.cli.findings import Finding
from nanotron_fast.units import size

# More than any file of a checkpoint has.
_LARGEST_FILE_BYTES = 10**12
_LEAST_FREE_BYTES = 10**9
_ELSEWHERE = "nanotron-fast doctor DIR looks at another directory"


def total_bytes(folder: Path) -> int:
    """The size of the file system that a folder is on."""
    found = os.statvfs(folder)
    return found.f_blocks * found.f_frsize


def findings(folder: Path) -> Iterator[Finding]:
    """Of the file system that a folder is on."""
    try:
        # Without a name, where the file system can do that.
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    except OSError as error:
        found = f"{folder.resolve()} cannot be written to: {error.strerror}"
        yield Finding("destination", "missing", found, _ELSEWHERE)
        return
    with file:
        descriptor = file.fileno()
        yield _space(folder)
        yield _direct(descriptor)
        yield _large(descriptor)
        yield _locks(descriptor)


def _space(folder: Path) -> Finding:
    found = os.statvfs(folder)
    if not found.f_blocks:
        return Finding("destination", "ok", f"{folder.resolve()}, which says no size")
    free = found.f_bavail * found.f_frsize
    told = f"{folder.resolve()}, {size(free)} free"
    if free < _LEAST_FREE_BYTES:
        return Finding("destination", "missing", told, f"make room, or {_ELSEWHERE}")
    return Finding("destination", "ok", told)


def _direct(descriptor: int) -> Finding:
    try:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    except OSError as error:
        found = f"--io direct is refused ({error.strerror}): all passes through the page cache"
        remedy = "a file system with O_DIRECT, such as ext4 or XFS, for checkpoints beyond memory"
        return Finding("O_DIRECT", "slow", found, remedy)
    return Finding("O_DIRECT", "ok", "--io direct is taken")


def _large(descriptor: int) -> Finding:
    try:
        os.ftruncate(descriptor, _LARGEST_FILE_BYTES)
    except OSError as error:
        if error.errno not in (errno.EFBIG, errno.EINVAL, errno.ENOSPC):
            raise
        found = f"a file of 1 TB is refused: {error.strerror}"
        remedy = "ulimit -f unlimited, another file system, or convert --max-shard-size"
        return Finding("large files", "missing", found, remedy)
    os.ftruncate(descriptor, 0)
    return Finding("large files", "ok", "1 TB is taken")


def _locks(descriptor: int) -> Finding:
    """Conversion needs none; making tokens of text keeps other processes out with one."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        found = f"refused ({error.strerror}): two runs may make tokens of one text at once"
        remedy = "mount it with locks; nanotron-fast tokenize before the runs start"
        return Finding("flock", "missing", found, remedy)
    return Finding("flock", "ok", "taken")
