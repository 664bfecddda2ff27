"""What must hold of every input, whatever it is: else a `Finding` comes out."""

from __future__ import annotations

import os
import signal
import traceback
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Protocol

from nanotron_fast.errors import NanotronFastError, one_line

# Of a processor's time, so that a busy machine makes no find; waiting takes none, and has a limit
# of its own.
SECONDS = 5.0
TIMES_WALL = 12
# What Python needs for a plan of a tiny model, and for each byte of the input: an empty set, the
# dearest thing that one byte of a pickle makes, takes 216.
BASE_BYTES = 48 << 20
BYTES_FOR_EACH = 512
# A path may have 4096 characters, and some messages have two.
MAX_MESSAGE = 10_000


class Finding(BaseException):
    """An input that something must not do. No library function catches it."""


class Target(Protocol):
    """One reader, and all that leads to it."""

    @property
    def name(self) -> str:
        """As `make fuzz TARGET=` has it."""

    def seeds(self) -> list[bytes]:
        """Inputs that are as they should be."""

    def run(self, data: bytes, box: Path) -> None:
        """Reads an input. What it writes lies in `box/work`."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises Finding in the main thread where something takes longer, in Python at least.

    `seconds` are those of the processor; those of the clock may be TIMES_WALL as many.
    """

    def ring(_: int, frame: FrameType | None) -> None:
        where = "".join(traceback.format_stack(frame, limit=4)) if frame else ""
        raise Finding(f"it takes longer than {seconds:g} s, at\n{where}")

    timers = (
        (signal.SIGPROF, signal.ITIMER_PROF, seconds),
        (signal.SIGALRM, signal.ITIMER_REAL, TIMES_WALL * seconds),
    )
    before = [signal.signal(number, ring) for number, _, _ in timers]
    for _, timer, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def state_of(box: Path) -> dict[str, object]:
    """Everything in a box but for `work`: what no input may touch."""
    found: dict[str, object] = {}
    for folder, folders, files in os.walk(box):
        if Path(folder) == box:
            folders[:] = sorted(set(folders) - {"work"})
        for name in files:
            path = Path(folder, name)
            found[os.fspath(path.relative_to(box))] = path.read_bytes()
        for name in folders:
            path = Path(folder, name)
            found[os.fspath(path.relative_to(box))] = path.is_symlink()
    return found


def make_box(box: Path) -> Path:
    """A folder with `work` in it, and files beside that, which stay as they are."""
    (box / "work").mkdir(parents=True)
    (box / "outside").mkdir()
    for name in ("canary", "outside/canary", "outside/config.json", "latest.txt"):
        (box / name).write_bytes(b"canary of " + name.encode())
    return box


def check(target: Target, data: bytes, box: Path, *, traces_memory: bool = False) -> str | None:
    """Runs an input in a box; the first line of its refusal, or None where it is taken.

    Raises Finding where it lets out another error than ours and OSError, says much of it,
    takes too long, touches something outside of `box/work`, or (with `traces_memory`) takes more
    memory than its size allows.
    """
    before = state_of(box)
    message: str | None = None
    if traces_memory:
        tracemalloc.reset_peak()
        start = tracemalloc.get_traced_memory()[0]
    try:
        with limited(SECONDS):
            target.run(data, box)
    except (NanotronFastError, OSError) as error:
        message = one_line(error)
    except Finding:
        raise
    except BaseException as error:
        told = "".join(traceback.format_exception(error)[-8:])
        raise Finding(f"{type(error).__name__} comes out of it:\n{told}") from None
    if message is not None and not 0 < len(message) <= MAX_MESSAGE:
        raise Finding(f"it is refused in {len(message):,} characters: {message[:1000]!r}")
    if traces_memory:
        taken = tracemalloc.get_traced_memory()[1] - start
        if taken > BASE_BYTES + BYTES_FOR_EACH * len(data):
            raise Finding(f"{len(data):,} bytes of it take {taken:,} bytes of memory")
    after = state_of(box)
    changed = sorted(
        key for key in {*before, *after} if before.get(key, None) != after.get(key, None)
    )
    if changed:
        raise Finding(f"it changes what is not its own: {', '.join(changed[:5])}")
    return message


@contextmanager
def tracing() -> Iterator[None]:
    """Python's allocations are counted within."""
    tracemalloc.start()
    try:
        yield
    finally:
        with suppress(RuntimeError):
            tracemalloc.stop()
