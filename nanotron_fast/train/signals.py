"""SIGTERM and SIGUSR1 as a request to save and leave: how clusters pre-empt a run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether a signal asked this process to stop, and which.

    It is asked between steps; whoever is asked more than once does what he was doing anyway.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @property
    def name(self) -> str | None:
        """Of the signal, which may have been another rank's; None where there was none."""
        return None if self.number is None else signal.Signals(self.number).name

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Notes the signals while the block runs; outside the main thread there are none to note."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in ASKING}
    for number in ASKING:
        signal.signal(number, request._note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
