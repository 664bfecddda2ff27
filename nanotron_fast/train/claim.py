"""The right to write to the folder of a run, which one run at a time has."""

from __future__ import annotations

import contextlib
import errno
import time
from pathlib import Path

from nanotron_fast.checkpoints.claims import LOCK
from nanotron_fast.checkpoints.ownership import Holder, Lock, holder_of
from nanotron_fast.checkpoints.partial import new_run
from nanotron_fast.errors import DestinationError
from nanotron_fast.train.checkpoint import clear

_POLL_SECONDS = 0.5


def claim(root: Path) -> Lock:
    """Takes the lock of a run's folder, and removes what killed runs have left there.

    For the first rank. A run that was killed on this machine is known to be dead at once. Of one on
    another machine, from which this one may be sent off again within seconds, the lock is watched:
    its owner touches it every few seconds where it lives, and is dead after 30 s without.

    Raises DestinationError where another run lives, which says whose it is; OSError.
    """
    root.mkdir(parents=True, exist_ok=True)
    lock = Lock(root / LOCK, root, new_run())
    first: Holder | None = None
    has_room = True
    while True:
        try:
            lock.acquire()
        except DestinationError:
            found = holder_of(lock.path, now=0.0)
            if found is None:
                continue
            is_of_here = found.owner is not None and found.owner.is_of_this_machine
            if is_of_here or (first is not None and first != found):
                raise DestinationError(
                    f"another run is writing to it: {found.owner or found.path}"
                ) from None
            first = found
            time.sleep(_POLL_SECONDS)
        except OSError as error:
            # What a killed run has left may be what fills the disk.
            found = holder_of(lock.path, now=0.0)
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            if not (is_full and has_room) or (found is not None and found.is_alive):
                raise
            has_room = False
            clear(root)
        else:
            break
    try:
        clear(root)
    except BaseException:
        give_up(lock)
        raise
    return lock


def give_up(lock: Lock) -> None:
    """Ends a claim. A lock that cannot be removed counts as dead once this process has ended."""
    with contextlib.suppress(OSError):
        lock.release()


def check(lock: Lock) -> None:
    """Raises DestinationError where the lock is another's, as after a halt of this machine."""
    if not lock.is_ours():
        raise DestinationError(
            f"{lock.path}: this run has it no more: {lock.taker() or 'somebody has removed it'}; "
            "it ends, since another may be writing to the same folder"
        )
