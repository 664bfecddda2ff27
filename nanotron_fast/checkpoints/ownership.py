"""Who writes to a destination: a lock that needs no flock, and that a dead owner does not keep.

The lock is a file that appears with its contents, by link(2), which is atomic on the file systems
of clusters too. It says whose it is, and its holder touches it every few seconds. On the same
machine a holder is alive as long as its process; seen from another one, as long as the file was
touched lately, by the clock of the file system. `claims.py` says where locks lie.

No run relies on the lock for its bytes: each writes to a folder of its own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from nanotron_fast.checkpoints.owners import DEAD_AFTER_SECONDS, Owner
from nanotron_fast.checkpoints.small_files import write_all
from nanotron_fast.errors import DestinationError
from nanotron_fast.formats.known_files import OURS

_BEAT_SECONDS = 5.0
# How long what is beside a lock for a moment may be there, where nothing says that its run is dead.
LITTER_SECONDS = 3600.0
# Beside a lock while it is made: the file that gets its name, and the one that had it.
_NEW, _BROKEN = "new", "broken"
_BESIDE = re.compile(rf"{re.escape(OURS)}([0-9a-f]{{8}})\.({_NEW}|{_BROKEN})")
_MAX_BYTES = 1 << 16
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


class Lock:
    """The right to write to a destination.

    Args:
        path: of the lock's file, in a folder that is there.
        destination: for messages.
        run: the name of this run.
    """

    def __init__(self, path: Path, destination: Path, run: str) -> None:
        self.path = path
        self._destination = destination
        self._owner = Owner.this(run)
        self._text = json.dumps(asdict(self._owner)).encode()
        self._is_taken = False
        self._is_over = threading.Event()

    def acquire(self) -> None:
        """Takes it, from a dead owner too. Raises DestinationError, which says whose it is."""
        beside = self.path.with_name(f"{OURS}{self._owner.run}.{_NEW}")
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            write_all(descriptor, self._text, beside)
            while not self._take(beside):
                self._break(beside)
            self._is_taken = True
        finally:
            os.close(descriptor)
            beside.unlink(missing_ok=True)
        threading.Thread(target=self._beat, name="nanotron_fast-lock", daemon=True).start()

    def _take(self, beside: Path) -> bool:
        try:
            os.link(beside, self.path)
        except FileExistsError:
            # NFS asks again where an answer is lost, and what it did the first time is in its way.
            return self.is_ours()
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # A file system without links: the contents come a moment after the name.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            try:
                descriptor = os.open(self.path, flags, 0o644)
            except FileExistsError:
                return False
            try:
                write_all(descriptor, self._text, self.path)
            except BaseException:
                self.path.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)
        return True

    def _break(self, beside: Path) -> None:
        """Removes the lock of a dead owner. Raises DestinationError where it is alive."""
        holder = holder_of(self.path, now=touched(beside))
        if holder is None:
            return
        if holder.is_alive:
            raise DestinationError(holder.refusal(self._destination))
        self.remove(holder)

    def remove(self, holder: Holder) -> None:
        """Removes a lock, this one's place or another, if it is still the one that was looked at.

        Raises OSError.
        """
        taken = holder.path.with_name(f"{OURS}{self._owner.run}.{_BROKEN}")
        try:
            holder.path.rename(taken)
        except FileNotFoundError:
            return
        if _text_of(taken) != holder.text:
            # Somebody else was faster, and has it now: what was taken is given back.
            with contextlib.suppress(OSError):  # else that one notices before it ends
                os.link(taken, holder.path)
        taken.unlink(missing_ok=True)

    def now(self, folder: Path) -> float:
        """The time by the clock of the file system that a folder lies on. Raises OSError."""
        if folder != self.path.parent:
            beside = folder / f"{OURS}{self._owner.run}.{_NEW}"
            # Where nothing can be made there, this lock's file system is the best that is known.
            with contextlib.suppress(OSError):
                beside.write_bytes(self._text)
                try:
                    return touched(beside)
                finally:
                    beside.unlink(missing_ok=True)
        return touched(self.path)

    def _beat(self) -> None:
        while not self._is_over.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):  # told by `is_ours`
                if self.is_ours():
                    os.utime(self.path)

    def is_ours(self) -> bool:
        """Whether it is there, and this run's. Raises OSError."""
        return _text_or_none(self.path) == self._text

    def taker(self) -> str | None:
        """Who else has it now, in words; None where nobody has. Raises OSError."""
        text = _text_or_none(self.path)
        if text in (None, self._text):
            return None
        return str(Owner.parse(text or b"") or f"whoever wrote {self.path}")

    def release(self) -> None:
        """Gives it up. May be called again, and where it was never taken. Raises OSError."""
        self._is_over.set()
        if self._is_taken and self.is_ours():
            self.path.unlink(missing_ok=True)
        self._is_taken = False


def touched(path: Path) -> float:
    """The time by the clock of the file system that a file of ours lies on, which is touched.

    Every age of a lock is told by it: the clocks of two machines may differ by more than a holder
    may be silent. Raises OSError.
    """
    os.utime(path)
    return path.stat().st_mtime


def _text_or_none(path: Path) -> bytes | None:
    try:
        return _text_of(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _text_of(path: Path) -> bytes:
    """What a lock says. Raises OSError, also where it is a link.

    Neither waits for a pipe, nor takes more of a file than a lock has.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    try:
        return os.read(descriptor, _MAX_BYTES)
    except OSError as error:  # which names no file, as where it is a folder
        error.filename = os.fspath(path)
        raise
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Holder:
    """What a lock's file says; `owner` is None where it cannot be read."""

    path: Path
    owner: Owner | None
    text: bytes
    silent_seconds: float

    @property
    def is_alive(self) -> bool:
        """Whether the owner lives, as far as can be known here."""
        if self.owner is None:
            return self.silent_seconds < DEAD_AFTER_SECONDS
        return self.owner.is_alive(self.silent_seconds)

    def refusal(self, destination: Path) -> str:
        """Why another may not write."""
        unread = (
            f"by whom cannot be read from {self.path}, which counts as dead when nobody has "
            f"touched it for {DEAD_AFTER_SECONDS:g} s"
        )
        who = f"{self.owner}" if self.owner else unread
        return f"{destination}: another run is writing to it: {who}"


def holder_of(path: Path, *, now: float) -> Holder | None:
    """Who has a lock; None where there is none. Raises OSError.

    Args:
        now: by the clock of the file system: see `touched`.
    """
    try:
        status = path.lstat()
        text = _text_of(path)
    except FileNotFoundError:
        return None
    return Holder(path, Owner.parse(text), text, now - status.st_mtime)


def is_beside_a_lock(name: str) -> bool:
    """Whether a file is one that lies beside a lock for the moment in which that is made."""
    return _BESIDE.fullmatch(name) is not None


def sweep_beside(folder: Path, now: float) -> None:
    """Removes what is beside locks and surely of no living run, of any destination.

    Raises OSError.
    """
    found = [match for match in map(_BESIDE.fullmatch, os.listdir(folder)) if match is not None]
    dead: set[str] = set()
    for match in found:
        path = folder / match[0]
        if match[2] == _NEW and _is_surely_dead(path, now):
            path.unlink(missing_ok=True)
            dead.add(match[1])
    # These say whose lock it was, and not who took it; they change when they get their name.
    for match in found:
        path = folder / match[0]
        if match[2] == _BROKEN and os.path.lexists(path):
            is_old = now - path.lstat().st_ctime >= LITTER_SECONDS
            if (is_old or match[1] in dead) and _is_surely_dead(path, now):
                path.unlink(missing_ok=True)


def _is_surely_dead(path: Path, now: float) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    holder = holder_of(path, now=now)
    if holder is None:
        return False
    if holder.owner is not None and holder.owner.is_of_this_machine:
        return not holder.is_alive
    return holder.silent_seconds >= LITTER_SECONDS
