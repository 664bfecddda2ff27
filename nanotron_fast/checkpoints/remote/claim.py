"""Who writes to a folder of a store: an object of each run that says so.

    s3://bucket/out/.nanotron_fast.lock-0a1b2c3d

A listing of a store shows what was written before it. So a run writes its object, lists, and goes
on when no other living run has one. Of two that see each other before either has gone on, the one
that came first by the store's clock waits until the other has given way; each goes on only after a
listing without the other, so never both. One object that is created only where there is none would
do for that, where a store has such a thing, but not for taking over from a run that has died: who
removes its object may remove that of a third one, which was faster.

The holder writes its object again every few seconds. Seen from another machine it is dead when it
has not done so for a while, by the store's clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from nanotron_fast.checkpoints.owners import Owner
from nanotron_fast.checkpoints.remote.store import Store, Version
from nanotron_fast.errors import DestinationError
from nanotron_fast.formats.known_files import OURS

# How often a holder is heard of, and how long it may be silent: a request may be tried for long.
BEAT_SECONDS = 15.0
DEAD_AFTER_SECONDS = 120.0
_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 5.0
_PREFIX = f"{OURS}lock-"
_MAX_BYTES = 1 << 16
# A run looks who else is there, goes on, or has ended and left files that are of no use.
_LOOKS, _WRITES, _ENDED = "looks", "writes", "ended"


def is_claim(name: str) -> bool:
    """Whether a file in the folder is one of these."""
    return name.startswith(_PREFIX)


@dataclass(frozen=True, slots=True)
class _Other:
    """What the object of another run says."""

    name: str
    owner: Owner | None
    state: str
    # When it came, by the store's clock, and its run's name where that is the same.
    rank: tuple[float, str]
    silent_seconds: float

    @property
    def is_alive(self) -> bool:
        if self.state == _ENDED:
            return False
        if self.owner is None:
            return self.silent_seconds < DEAD_AFTER_SECONDS
        return self.owner.is_alive(self.silent_seconds, DEAD_AFTER_SECONDS)


class StoreClaim:
    """The right of a run to write to a folder of a store. For one process of the run.

    Args:
        store: the folder.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._run = os.urandom(4).hex()
        self._owner = Owner.this(self._run)
        self._name = f"{_PREFIX}{self._run}"
        self._since: float | None = None
        self._is_over = threading.Event()
        # Held while the object is written: the last to write it is not the thread.
        self._writing = threading.Lock()
        self._is_taken = False

    def acquire(self) -> None:
        """Takes it. Raises DestinationError, which says who has it; OSError."""
        self._is_taken = True
        try:
            self._write(_LOOKS)
            while living := [each for each in self._others() if each.is_alive]:
                first = next((each for each in living if self._gives_way_to(each)), None)
                if first is not None:
                    raise DestinationError(self._refusal(first))
                time.sleep(_POLL_SECONDS)
                self._write(_LOOKS)
            self._write(_WRITES)
        except BaseException:
            with contextlib.suppress(OSError):  # the error that ends it is the one to tell
                self.release()
            raise
        threading.Thread(target=self._beat, name="nanotron_fast-claim", daemon=True).start()

    def _gives_way_to(self, other: _Other) -> bool:
        return other.state != _LOOKS or other.rank < self._rank

    @property
    def _rank(self) -> tuple[float, str]:
        return self._since or 0.0, self._run

    def _refusal(self, other: _Other) -> str:
        who = f"{other.owner}" if other.owner else "by whom cannot be read"
        return (
            f"{self._store.url}: another run is writing to it: {who}, as {other.name} in it "
            f"says, which counts as dead when nobody has written it for {DEAD_AFTER_SECONDS:g} s"
        )

    def _write(self, state: str) -> None:
        document = {"owner": asdict(self._owner), "state": state, "since": self._since}
        self._store.write(self._name, json.dumps(document).encode())

    def _beat(self) -> None:
        while not self._is_over.wait(BEAT_SECONDS):
            with self._writing, contextlib.suppress(OSError):  # others then count it as dead
                if not self._is_over.is_set():
                    self._write(_WRITES)

    def _others(self) -> list[_Other]:
        """All other runs' objects. Raises DestinationError where this one's is gone; OSError."""
        found = self._store.files(in_folders=False)
        mine = found.get(self._name)
        if mine is None:
            raise DestinationError(
                f"{self._store.url}: {self._name} in it, which says that this conversion writes to "
                "it, is not there any more: something has removed it; this one ends"
            )
        now = mine.seconds
        if self._since is None:
            self._since = now or 0.0
        others = []
        for name in sorted(found):
            if is_claim(name) and name != self._name:
                with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
                    others.append(self._read(name, found[name], now))
        return others

    def _read(self, name: str, version: Version, now: float | None) -> _Other:
        seconds = version.seconds
        # Where the store tells no time, a run of another machine is taken for living.
        silent = 0.0 if now is None or seconds is None else now - seconds
        size = min(version.size_bytes, _MAX_BYTES)
        data = self._store.read(name, 0, size) if size else b""
        owner, state, since = _parsed(data)
        came = since if since is not None else (seconds or 0.0)
        return _Other(name, owner, state, (came, name.removeprefix(_PREFIX)), silent)

    def has_dead(self) -> bool:
        """Whether a run has ended here whose files may still be there. Raises OSError."""
        return any(not each.is_alive for each in self._others())

    def check(self) -> None:
        """Raises DestinationError where another run has counted this one as dead; OSError."""
        for other in self._others():
            if other.is_alive and other.state == _WRITES and other.rank > self._rank:
                raise DestinationError(
                    f"{self._refusal(other)}; it began since nothing was heard of this one, which "
                    "ends"
                )

    def sweep(self) -> None:
        """Removes the objects of dead runs, whose files are there no more. Raises OSError."""
        for other in self._others():
            if not other.is_alive:
                self._store.remove(other.name)

    def release(self) -> None:
        """Gives it up. May be called again, and where it was never taken. Raises OSError."""
        self._end(lambda: self._store.remove(self._name))

    def leave(self) -> None:
        """Ends, and says that what lies here is of no use. Raises OSError."""
        self._end(lambda: self._write(_ENDED))

    def _end(self, last: Callable[[], None]) -> None:
        self._is_over.set()
        # A store that does not answer keeps nobody waiting: the object is a dead run's then.
        if self._is_taken and self._writing.acquire(timeout=_PATIENCE_SECONDS):
            try:
                self._is_taken = False
                last()
            finally:
                self._writing.release()


def _parsed(data: bytes) -> tuple[Owner | None, str, float | None]:
    """Whose an object is, what that run does, and since when; as far as it can be read."""
    try:
        document = json.loads(data)
        owner = Owner.parse(json.dumps(document["owner"]).encode())
        state, since = document["state"], document["since"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None, _WRITES, None
    is_number = isinstance(since, int | float) and not isinstance(since, bool)
    return owner, state if state in (_LOOKS, _ENDED) else _WRITES, since if is_number else None
