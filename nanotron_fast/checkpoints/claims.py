"""The right to write to a destination, by a lock in every place where others look for one.

    out/.nanotron_fast.lock       within the destination, where that is there
    .out.nanotron_fast.lock       beside it, where its folder can be written to

The first is found by whoever has the folder under any name, as through another mount; the second by
all who write to that name, whether there is a folder or not. Neither depends on what is in the
folder, which changes while a run goes on: a run takes both, where it can, and looks in both.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

from nanotron_fast.checkpoints.ownership import Holder, Lock, holder_of, sweep_beside
from nanotron_fast.errors import DestinationError
from nanotron_fast.formats.known_files import OURS

LOCK = f"{OURS}lock"
_NUMBERS = re.compile(r"(?:-(\d{1,9})-of-(\d{1,9}))?")
# The longest name of a file on Linux.
_MAX_NAME_BYTES = 255
_PATIENCE_SECONDS, _POLL_SECONDS = 2.0, 0.02

Share = tuple[int, int]


def fits(name: str) -> bool:
    """Whether a file system takes a name, however long those are that it is put together from."""
    return len(os.fsencode(name)) <= _MAX_NAME_BYTES


def _within(destination: Path, share: Share | None) -> Path:
    return destination / f"{LOCK}{_number(share)}"


def _beside(destination: Path, share: Share | None) -> Path:
    return destination.with_name(f".{destination.name}{LOCK}{_number(share)}")


def _number(share: Share | None) -> str:
    return f"-{share[0]}-of-{share[1]}" if share else ""


def _places(destination: Path, share: Share | None) -> list[Path]:
    """The locks that a run takes, in the order in which all take them."""
    within, beside = _within(destination, share), _beside(destination, share)
    is_there = destination.is_dir()
    found = []
    if is_there and os.access(destination, os.W_OK | os.X_OK):
        found.append(within)
    # What lies beside a mount point is of another file system, which may be another one elsewhere.
    can_be_beside = fits(beside.name) and os.access(destination.parent, os.W_OK | os.X_OK)
    if can_be_beside and not (is_there and os.path.ismount(destination)):
        found.append(beside)
    # Where there is none, the error of the attempt says why.
    return found or [within if is_there else beside]


class Claim:
    """What a run holds while it writes to a destination.

    Args:
        destination: the folder, whose parent is there.
        run: the name of this run.
        share: (I, N) where it does one share of N.
    """

    def __init__(self, destination: Path, run: str, share: Share | None) -> None:
        self._destination = destination
        self._run = run
        self._share = share
        self._locks: list[Lock] = []

    def acquire(self) -> None:
        """Takes it, from a dead owner too, and sweeps away what dead runs have left of theirs.

        Raises DestinationError, which says whose it is; OSError.
        """
        try:
            for path in _places(self._destination, self._share):
                lock = Lock(path, self._destination, self._run)
                lock.acquire()
                self._locks.append(lock)
        except BaseException:
            self.release()
            raise
        with contextlib.suppress(OSError):  # what stays is in nobody's way
            self._sweep()

    def _sweep(self) -> None:
        first = self._locks[0]
        for folder in self._folders():
            now = first.now(folder)
            # Those of shares may be broken by their own next runs.
            for path, _ in [] if self._share else self._all_in(folder):
                holder = holder_of(path, now=now)
                if holder is not None and not self._is_own(path) and not holder.is_alive:
                    first.remove(holder)
            sweep_beside(folder, now)

    def _folders(self) -> list[Path]:
        folders = (self._destination.parent, self._destination)
        return [each for each in folders if each.is_dir()]

    def _all_in(self, folder: Path) -> list[tuple[Path, Share | None]]:
        """The locks in a folder, with the share that each is for."""
        make = _within if folder == self._destination else _beside
        whole = make(self._destination, None).name
        found: list[tuple[Path, Share | None]] = []
        for name in sorted(os.listdir(folder)):
            match = _NUMBERS.fullmatch(name, len(whole)) if name.startswith(whole) else None
            if match is not None:
                share = (int(match[1]), int(match[2])) if match[1] else None
                found.append((folder / name, share))
        return found

    def _is_own(self, path: Path) -> bool:
        return any(path == lock.path for lock in self._locks)

    def living(self) -> list[tuple[Holder, Share | None]]:
        """Who else writes to the destination, with the share that it does. Raises OSError."""
        found: list[tuple[Holder, Share | None]] = []
        for folder in self._folders():
            others = [each for each in self._all_in(folder) if not self._is_own(each[0])]
            now = self._locks[0].now(folder) if others else 0.0
            for path, share in others:
                holder = holder_of(path, now=now)
                if holder is not None and holder.is_alive:
                    found.append((holder, share))
        return found

    def check(self) -> None:
        """Raises DestinationError where another run has it too, as from a dead owner; OSError."""
        taker = self.taker()
        if taker is not None:
            raise DestinationError(
                f"{self._destination}: another conversion has taken the lock, since nothing was "
                f"heard of this one: {taker}; this one ends"
            )
        if not any(lock.is_ours() for lock in self._locks):
            raise DestinationError(
                f"{self._destination}: the lock {self._locks[0].path} is not there any more: "
                "something has removed it; this one ends, since another may have begun"
            )
        # One that came by another name of the folder; one that is about to be refused ends soon.
        until = time.monotonic() + _PATIENCE_SECONDS
        while found := self.living():
            if time.monotonic() >= until:
                raise DestinationError(f"{found[0][0].refusal(self._destination)}; this one ends")
            time.sleep(_POLL_SECONDS)

    def taker(self) -> str | None:
        """Who has taken it from this run, in words; None where nobody has. Raises OSError."""
        takers = (lock.taker() for lock in self._locks)
        return next((each for each in takers if each is not None), None)

    def release(self) -> None:
        """Gives it up. May be called again."""
        for lock in self._locks:
            with contextlib.suppress(OSError):  # its owner has ended then
                lock.release()
