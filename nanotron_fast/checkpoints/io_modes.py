"""Choosing how bytes pass between files and memory: `--io`.

A checkpoint that is larger than memory pushes everything else out of the page cache as it passes
through it, and gains nothing from lying there. See docs/io.md for measurements.
"""

from __future__ import annotations

import os
from pathlib import Path

from nanotron_fast.errors import ConfigError

MODES = ("auto", "buffered", "direct", "dontcache")
# Of the memory that is free: what passes through the page cache beside what others have there.
_SHARE = 0.5
_GROUPS = Path("/sys/fs/cgroup")
# In their files: no limit.
_UNLIMITED = 1 << 60
# File systems that are memory: there is nothing to pass by.
_IN_MEMORY = ("tmpfs", "ramfs", "hugetlbfs", "devtmpfs")


def check_mode(io: str) -> str:
    """Raises ConfigError on an unknown mode."""
    if io not in MODES:
        raise ConfigError(f"--io {io}: choose {', '.join(MODES[:-1])} or {MODES[-1]}")
    return io


def mode_for(io: str, place: Path, num_bytes: int) -> str:
    """What a mode means for a run that reads and writes `num_bytes` in all, at a place.

    `auto` passes through the page cache as long as half of the memory that is free would hold all
    of it, and on file systems that lie in memory.
    """
    if check_mode(io) != "auto":
        return io
    if num_bytes <= _SHARE * available_bytes() or _file_system(place) in _IN_MEMORY:
        return "buffered"
    return "dontcache"


def available_bytes() -> int:
    """Memory that this process may still take, the page cache included."""
    free = _meminfo("MemAvailable")
    limits = [_UNLIMITED if free is None else free, *_group_limits()]
    return min(limits)


def _meminfo(key: str) -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith(f"{key}:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):  # not Linux
        pass
    return None


def _group_limits() -> list[int]:
    """Limits of the control groups that this process is in, of either version of them."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    limits = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, name = _GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = _GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        parts = Path(group.lstrip("/")).parts
        for depth in range(len(parts), -1, -1):
            limit = _number(top.joinpath(*parts[:depth], name))
            if limit is not None:
                limits.append(limit)
    return limits


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # there is none, or it is "max"
        return None


def _file_system(place: Path) -> str:
    """The type of the file system that a path lies on, or will; empty where it is not known."""
    real = os.path.realpath(place)
    best, kind = "", ""
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                _, where, found, *_ = line.split(" ")
                mount = where.encode("utf-8", "surrogateescape").decode("unicode_escape")
                within = mount == "/" or real == mount or real.startswith(f"{mount}/")
                if within and len(mount) >= len(best):
                    best, kind = mount, found
    except OSError:  # not Linux
        pass
    return kind
