"""A command that is timed, and the most memory that it held.

What the kernel says of a child that has ended (`ru_maxrss`) begins with what this process held when
it started the child, and so says nothing of a small one. The peak of a process that runs is its
own: it is read every few milliseconds, of those that it starts too. Where the kernel's number is
larger than this process ever was, it is the child's own, and exact.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_PAUSE_SECONDS = 0.002


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that has ended."""

    status: int
    stdout: str
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


def run_watched(words: Sequence[str], env: Mapping[str, str]) -> Ended:
    """Runs a command to its end. Raises OSError where it cannot be started."""
    mine = peak_of(os.getpid())
    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, env=env, text=True)
    is_over = threading.Event()
    peaks = [0]

    def watch() -> None:
        while not is_over.wait(_PAUSE_SECONDS):
            peaks.append(max(peaks.pop(), *map(peak_of, family_of(process.pid)), 0))

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stdout is not None
    with process.stdout:
        stdout = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    is_over.set()
    watcher.join()
    told = usage.ru_maxrss * 1024
    return Ended(
        process.returncode,
        stdout,
        seconds,
        usage.ru_utime + usage.ru_stime,
        told if told > max(mine, peak_of(os.getpid())) else peaks[0],
    )


def family_of(pid: int) -> Iterator[int]:
    """A process and those that it has started, theirs too."""
    yield pid
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            children = file.read().split()
    except OSError:  # it has ended
        return
    for child in children:
        yield from family_of(int(child))


def peak_of(pid: int) -> int:
    """The most bytes that a process has held since its program began; 0 of one that has ended."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
