"""Signals that ask a command to stop: SIGINT, SIGTERM and SIGHUP.

The first statement of the command installs the handlers, so nothing heavy is imported here. Whoever
has something to clean up does so within `ending()`, and says in `remains` what is left.
"""

from __future__ import annotations

import _thread
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import threading

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# An exception between two statements of these leaves locks taken, lets go of what is not taken, or
# is lost where a weak reference ends.
_DELICATE = frozenset(
    [
        "_weakrefset",
        "concurrent.futures._base",
        "concurrent.futures.thread",
        "queue",
        "threading",
        "weakref",
    ]
)
# So a signal comes again a moment later there. Who is still at it then waits, which may be cut off.
_MOMENT_SECONDS = 0.005
_NUM_MOMENTS = 20


class Interrupted(BaseException):
    """A signal asked the command to stop. No `except Exception` may keep it from doing so."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number
        # What is left of the work, in words; None where nothing was begun.
        self.remains: str | None = None

    @property
    def exit_code(self) -> int:
        """As a shell says it: 130, 143 or 129."""
        return 128 + self.number


class _State:
    """What the handler must know. Signals are the process's, and so is this."""

    def __init__(self) -> None:
        self.depth = 0
        self.num_moments = 0
        self.pending: int | None = None
        self.previous: dict[int, Any] = {}


_state = _State()


def _handle(number: int, frame: FrameType | None) -> None:
    if _state.depth:
        _state.pending = number
    elif (
        frame is not None and frame.f_globals.get("__name__") in _DELICATE and _comes_again(number)
    ):
        pass
    else:
        _state.num_moments = 0
        raise Interrupted(number)


def _comes_again(number: int) -> bool:
    """Whether the signal is sent once more, in a moment."""
    if _state.num_moments == _NUM_MOMENTS:
        return False

    # To this thread: a wait within it ends only so.
    receiver = _thread.get_ident()

    def send() -> None:
        time.sleep(_MOMENT_SECONDS)
        signal.pthread_kill(receiver, number)

    try:
        # Not threading.Thread, the locks of which may be what the signal came between.
        _thread.start_new_thread(send, ())
    except RuntimeError:  # no more threads
        return False
    _state.num_moments += 1
    return True


def install(*more: int) -> None:
    """Lets the signals, and more, raise Interrupted; one that is ignored (nohup) stays so."""
    for number in (*_SIGNALS, *more):
        before = signal.getsignal(number)
        if before is not signal.SIG_IGN and before is not _handle:
            _state.previous[number] = before
            signal.signal(number, _handle)


def restore() -> None:
    """Gives the signals back to whoever had them: a script that is run has its own ways."""
    for number, handler in _state.previous.items():
        signal.signal(number, handler)
    _state.previous.clear()


def ignore() -> None:
    """From here on the work is done, and its exit code stands."""
    for number in {*_SIGNALS, *_state.previous}:
        signal.signal(number, signal.SIG_IGN)


def _is_answered_here() -> bool:
    """Whether handlers run in this thread. What another one is at is not cut in two by them."""
    import threading

    return threading.current_thread() is threading.main_thread()


@contextmanager
def _deferred() -> Iterator[None]:
    _state.depth += 1
    try:
        yield
    finally:
        _state.depth -= 1


@contextmanager
def held() -> Iterator[None]:
    """A part that a signal must not cut in two: it raises Interrupted at the end."""
    if not _is_answered_here():
        yield
        return
    with _deferred():
        yield
    number, _state.pending = _state.pending, None
    if number is not None:
        _handle(number, None)


def wait(event: threading.Event, seconds: float) -> bool:
    """Waits for an event, for a moment; a signal is answered at the end of it.

    Within, the exception would come between a lock that is let go and one that is taken, and become
    another one.
    """
    with held():
        return event.wait(seconds)


@contextmanager
def ending() -> Iterator[None]:
    """Cleaning up for an error or a signal: another signal changes nothing."""
    if not _is_answered_here():
        yield
        return
    with _deferred():
        yield
    if not _state.depth:
        _state.pending = None


@contextmanager
def telling(remains: Callable[[], str]) -> Iterator[None]:
    """Says what is left of the work, where a signal ends this part."""
    try:
        yield
    except Interrupted as interruption:
        if interruption.remains is None:
            interruption.remains = remains()
        raise
