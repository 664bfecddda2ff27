"""Holding Python's search for cycles back while a plan is made.

A plan is hundreds of thousands of objects that stay and have no cycles among them. Looking for some
again and again took a quarter of the time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def keeping_objects() -> Iterator[None]:
    """No cycles are looked for meanwhile, in the whole process."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
