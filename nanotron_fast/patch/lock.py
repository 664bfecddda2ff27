"""One lock for all that this package puts into other people's modules, and takes out again.

Reentrant: what holds it may call what takes it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

LOCK = threading.RLock()
_P = ParamSpec("_P")
_T = TypeVar("_T")


def one_at_a_time(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """A function that waits until no other thread is in one of these."""

    @functools.wraps(function)
    def locked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with LOCK:
            return function(*args, **kwargs)

    return locked
