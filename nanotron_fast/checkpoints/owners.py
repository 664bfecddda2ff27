"""Which process has a claim on something, and whether it lives.

On the same machine a process is alive as long as it runs; of one on another machine nothing is
known but when it was last heard of, by the clock of the place where it says so.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass

# How long an owner on another machine may be silent.
DEAD_AFTER_SECONDS = 30.0


def boot_id() -> str:
    """What this system calls the time since it was started; "" where it has no name for that."""
    return _read("/proc/sys/kernel/random/boot_id").strip()


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:  # not Linux
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _ticks_at_start(pid: int) -> int | None:
    """When a process was started, in ticks since the boot; None where there is no such process."""
    text = _read(f"/proc/{pid}/stat")
    # The name of the program, in brackets, may hold anything.
    fields = text.rpartition(")")[2].split()
    if len(fields) < 20 or fields[0] in ("Z", "X"):
        return None
    return int(fields[19])


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that writes to a destination.

    Args:
        run: the name of its run.
        host, boot, namespace: the machine, what it calls the time since its start, and the
            namespace in which `pid` counts.
        pid, ticks: the process, and when it was started.
        since: seconds since 1970.
    """

    run: str
    host: str
    boot: str
    namespace: str
    pid: int
    ticks: int
    since: float

    @classmethod
    def this(cls, run: str) -> Owner:
        """The process that calls."""
        pid = os.getpid()
        return cls(
            run,
            os.uname().nodename,
            boot_id(),
            _namespace(),
            pid,
            _ticks_at_start(pid) or 0,
            time.time(),
        )

    @classmethod
    def parse(cls, text: bytes) -> Owner | None:
        """What a lock says; None where it says nothing of the kind."""
        try:
            found = json.loads(text)
            owner = cls(**found)
        except (ValueError, TypeError, RecursionError):
            return None
        kinds = (str, str, str, str, int, int, float)
        values = asdict(owner).values()
        are_right = all(isinstance(value, kind) for value, kind in zip(values, kinds, strict=True))
        return owner if are_right else None

    @property
    def is_of_this_machine(self) -> bool:
        """Whether its number counts here, and since this start of the machine."""
        here = (boot_id(), _namespace())
        return all(here) and here == (self.boot, self.namespace)

    def is_alive(
        self, silent_seconds: float, dead_after_seconds: float = DEAD_AFTER_SECONDS
    ) -> bool:
        """Whether it lives, as far as can be known here."""
        if self.is_of_this_machine:
            return _ticks_at_start(self.pid) == self.ticks
        return silent_seconds < dead_after_seconds

    def __str__(self) -> str:
        try:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        except (ValueError, OverflowError, OSError):  # no year that can be told
            since = f"{self.since:g}"
        return f"process {self.pid} on {self.host}, since {since}"
