"""Two folders that change their names at once, and one that takes a name only where it is free."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_NO_REPLACE, _EXCHANGE = 1, 2
_AT_HERE = -100
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def _rename(one: Path, other: Path, flags: int) -> bool:
    """Linux's renameat2; False where the system or the file system cannot do that."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_HERE, os.fsencode(one), _AT_HERE, os.fsencode(other), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), os.fspath(other))


def exchange(one: Path, other: Path) -> bool:
    """Two folders change their names, at no moment without one.

    Returns False where the file system cannot do that; nothing has changed then. Raises OSError.
    """
    return _rename(one, other, _EXCHANGE)


def rename_to_free(one: Path, other: Path) -> None:
    """Renames a folder; a name that is taken is an error where the file system can tell.

    Raises OSError.
    """
    if not _rename(one, other, _NO_REPLACE):
        one.rename(other)
