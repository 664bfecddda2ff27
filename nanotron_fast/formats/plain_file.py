"""Reading small files that others wrote, where a name may stand for anything.

A pipe would be waited for without end, a device read without end; a file of the kernel's (/proc,
/sys) says that it is empty and is not. All are refused, and nothing is read past what a file says
that it holds.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO, TypeGuard

from nanotron_fast.errors import CheckpointError
from nanotron_fast.moves.files import FileState, ReadFile

# The index of the largest model there is takes some megabytes.
MAX_SMALL_BYTES = 256 << 20
_BLOCK_BYTES = 1 << 20
_KERNEL_FOLDERS = ("/proc", "/sys", "/dev")
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
}
_notes: ContextVar[dict[Path, ReadFile] | None] = ContextVar("_notes", default=None)


@contextmanager
def noting() -> Iterator[dict[Path, ReadFile]]:
    """Notes each small file that is read meanwhile: what it was when it was read first."""
    notes: dict[Path, ReadFile] = {}
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def is_file_name(name: object) -> TypeGuard[str]:
    """Whether it names a file in a folder. A path could lead out of the checkpoint."""
    return (
        isinstance(name, str)
        and Path(name).name == name
        and name not in ("", "..")
        and "\x00" not in name
    )


def open_plain(path: Path) -> BinaryIO:
    """Opens a file for reading, unbuffered, without waiting. Raises CheckpointError, OSError."""
    # Asked first: to open some devices is to do something.
    _check_kind(path, os.stat(path).st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_kind(path, os.fstat(descriptor).st_mode)
        return open(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def _check_kind(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise CheckpointError(f"{path}: it is {kind}, not a plain file")


def check_plain(path: Path) -> None:
    """Raises CheckpointError where a path is not that of a plain file, on a disk; OSError."""
    _check_kind(path, os.stat(path).st_mode)
    real = os.path.realpath(path)
    if any(real.startswith(f"{folder}/") for folder in _KERNEL_FOLDERS) and not (
        real.startswith("/dev/shm/")
    ):
        raise CheckpointError(f"{path}: it is {real}, which the kernel makes up, not a plain file")


def read_small(path: Path, *, is_noted: bool = True) -> bytes:
    """The whole of a file of some megabytes at most. Raises CheckpointError, OSError.

    `is_noted`: for whoever is `noting`. What may well change meanwhile is not.
    """
    check_plain(path)
    with open_plain(path) as file:
        state = FileState.of(os.fstat(file.fileno()))
        size = state.size_bytes
        if size > MAX_SMALL_BYTES:
            raise CheckpointError(
                f"{path}: {size:,} bytes are over the limit of {MAX_SMALL_BYTES:,} for such a file"
            )
        blocks = []
        left = size
        while left > 0:
            block = file.read(left)
            if not block:
                break
            blocks.append(block)
            left -= len(block)
    data = b"".join(blocks)
    notes = _notes.get()
    if notes is not None and is_noted:
        digest = hashlib.sha256(data).hexdigest()
        notes.setdefault(path, ReadFile(state, digest, is_whole=True))
    return data


def changed(path: Path, then: int, now: int) -> CheckpointError:
    """The error for a source that is not any more what it was; its sizes in bytes."""
    return CheckpointError(
        f"{path}: it has changed while it was read ({then:,} bytes then, {now:,} now): what was "
        "written may be a mixture, and is given up"
    )


def digest_whole(path: Path) -> ReadFile:
    """What a file is, with a digest of all of it. Raises CheckpointError, OSError."""
    digest = hashlib.sha256()
    with open_plain(path) as file:
        state = FileState.of(os.fstat(file.fileno()))
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return ReadFile(state, digest.hexdigest(), is_whole=True)
