"""Root may write anywhere, unless it does without the capabilities that say so."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_VERSION = 0x20080522
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2
_Header = ctypes.c_uint32 * 2  # version, process
_Sets = ctypes.c_uint32 * 6  # effective, permitted and inheritable, twice 32 bits of each


@contextmanager
def ordinary_user() -> Iterator[None]:
    """This thread, and those that it starts, may write what modes of files and folders allow."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, before = _Header(_VERSION, 0), _Sets()
    _check(libc.capget(header, before))
    without = _Sets(*before)
    without[0] &= ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH)
    _check(libc.capset(header, without))
    try:
        yield
    finally:
        _check(libc.capset(header, before))


def _check(code: int) -> None:
    if code:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
