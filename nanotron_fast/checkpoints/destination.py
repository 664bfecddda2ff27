"""A directory that is either whole or not there.

A run writes to a folder of its own (`partial.py`), which takes the destination's place when it is
done: by one rename where there was nothing; by an exchange of names where a checkpoint is replaced;
part by part, the marks of a whole checkpoint last, where the destination is an empty directory or
a mount point, or lies in a folder that cannot be written to. That directory stays then, with its
owner, mode and access lists. `claims.py` keeps other runs out, and `settling.py` decides what
becomes of what earlier runs have left.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from nanotron_fast.checkpoints import placing
from nanotron_fast.checkpoints.claims import LOCK, Claim, Share, fits
from nanotron_fast.checkpoints.ownership import Holder, is_beside_a_lock
from nanotron_fast.checkpoints.partial import Leftover, Partial, leftovers, new_run, remove
from nanotron_fast.checkpoints.small_files import sync
from nanotron_fast.errors import DestinationError
from nanotron_fast.formats.known_files import OURS, foreign_names
from nanotron_fast.interruption import ending, held
from nanotron_fast.moves.plan import OutputFile
from nanotron_fast.units import first_few


class Destination:
    """Where a conversion's result will be.

    Args:
        path: of the directory.
        source: the checkpoint that is read.
        overwrite: what is there may be replaced, if it is a checkpoint.
        inputs: folders from which other files are read.
        share: (I, N) where this run does one share of N, and leaves its folder to another.
    """

    def __init__(
        self,
        path: Path,
        *,
        source: Path,
        overwrite: bool,
        inputs: Iterable[Path] = (),
        share: Share | None = None,
    ) -> None:
        """Checks that nothing of `source`, or of what else is read, would be lost.

        Raises DestinationError.
        """
        self.path = Path(os.path.realpath(path))
        if not self.path.name:
            raise DestinationError(f"{path}: the root of the file system cannot be a destination")
        self._overwrite = overwrite
        self._places = [Path(os.path.realpath(each)) for each in dict.fromkeys((source, *inputs))]
        self._check_apart(path)
        self._check_kind()
        self._run = new_run()
        self.is_inside = self.path.exists() and not (overwrite and self._can_be_exchanged())
        self._share = share
        self._lock: Claim | None = None
        self._partial: Partial | None = None
        self._is_whole = False
        # What has become of what this run wrote, where it is not this run's any more.
        self._lost: str | None = None
        # The nearest folder above that was there before.
        self._oldest_parent = self.path.parent
        while not self._oldest_parent.exists():
            self._oldest_parent = self._oldest_parent.parent

    @property
    def partial(self) -> Partial:
        """The folder that is written to, once it is open."""
        assert self._partial is not None
        return self._partial

    def _check_apart(self, path: Path) -> None:
        """Compares places, by name and by inode: one folder may be mounted in several places."""
        where = _identities(self.path)
        for number, place in enumerate(self._places):
            above = _identities(place)
            what = f"{place}, which is read," if number else f"the source {place}"
            if number == 0 and where[:1] == above[:1]:
                raise DestinationError(f"{path}: the destination is the source")
            if number == 0 and above[0] in where:
                raise DestinationError(f"{path}: the destination lies inside {what}")
            if where[0] in above:
                raise DestinationError(f"{path}: {what} lies inside the destination")

    def _check_kind(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise DestinationError(f"{self.path}: it is there, and is not a directory")

    def _can_be_exchanged(self) -> bool:
        """Whether another folder could take the name, and look the same from outside."""
        parent = self.path.parent
        return (
            any(not name.startswith(OURS) for name in os.listdir(self.path))
            and fits(self._beside.name)
            and os.access(parent, os.W_OK | os.X_OK)
            and not os.path.ismount(self.path)
            and self.path.stat().st_dev == parent.stat().st_dev
            and (os.geteuid() == 0 or self.path.stat().st_uid == os.geteuid())
        )

    def check(self, names: Collection[str] = ()) -> None:
        """Raises DestinationError where something is in the way.

        `names` are paths of the new result's files: what is replaced by its like is not lost.
        """
        self._check_kind()
        if any(each.is_between for each in leftovers(self.path)):
            return  # asked again when that is undone
        found = self._entries()
        if found and not self._overwrite:
            raise DestinationError(
                f"{self.path}: it is not empty; --overwrite replaces it once the new one is whole"
            )
        foreign = foreign_names(self.path, found, names) if found else []
        if foreign:
            raise DestinationError(
                f"{self.path}: --overwrite replaces a checkpoint, and there is more in it: "
                f"{first_few(foreign)}; move that away, or choose another destination"
            )

    def _entries(self) -> list[str]:
        """What is in the destination, but for what is this tool's for the time being."""
        if not self.path.is_dir():
            return []
        ours = {LOCK, *(each.path.name for each in leftovers(self.path))}
        return sorted(
            name
            for name in os.listdir(self.path)
            if name not in ours and not name.startswith(f"{LOCK}-") and not is_beside_a_lock(name)
        )

    def lock(self) -> None:
        """Makes the folders that the destination lies in, and claims it for this run.

        Raises DestinationError where another run has it, or where it cannot be written to.
        """
        with held():
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._lock = Claim(self.path, self._run, self._share)
                self._lock.acquire()
            except OSError as error:
                self._lock = None
                self._remove_parents()
                if isinstance(error, DestinationError):
                    raise
                reason = f"it cannot be written: {error.strerror}"
                name = self.path.name
                if error.errno == errno.ENAMETOOLONG and fits(name):
                    num_bytes = len(os.fsencode(name))
                    reason = (
                        f"its name of {num_bytes} bytes is too long for what is added to it while "
                        f"it is written (.{LOCK.lstrip('.')} and .partial-ID): choose a shorter one"
                    )
                raise DestinationError(error.errno, reason, str(self.path)) from error

    def living(self) -> list[tuple[Holder, Share | None]]:
        """Who else writes to it, with the share that it does. Raises OSError."""
        assert self._lock is not None
        return self._lock.living()

    def others(self) -> list[Leftover]:
        """What other runs have here. Raises DestinationError where the source lies in it."""
        found = leftovers(self.path)
        for leftover in found:
            for place in self._places:
                if _identities(leftover.path)[0] in _identities(place):
                    raise DestinationError(
                        f"{self.path}: {place}, which is read, lies in {leftover.path}, which an "
                        "earlier run has left; move it away"
                    )
        return found

    def open(self, sizes: Iterable[int] = (), names: Collection[str] = ()) -> Partial:
        """Makes the empty folder to write to.

        Args:
            sizes: of the files that will be written, in bytes.
            names: paths of the small files of the result.

        Raises:
            DestinationError: something is in the way, or the file system has no room for that.
            OSError: it cannot be written to.
        """
        self.check(names)
        with held():
            self._partial = Partial.create(self._partial_path)
            if self.path.exists() and not self.is_inside:
                placing.take_after(self.path, self._partial.content_path)
        self._check_space(list(sizes))
        return self._partial

    @property
    def place(self) -> tuple[str, bool]:
        """The name of this run, and whether its folder lies within: what others `join` by."""
        return self._run, self.is_inside

    def join(self, place: tuple[str, bool]) -> Partial:
        """Opens the folder that the first process has made. Raises OSError."""
        self._run, self.is_inside = place
        self._partial = Partial.join(self._partial_path)
        return self._partial

    @property
    def _partial_path(self) -> Path:
        return self.path / f"{OURS}partial-{self._run}" if self.is_inside else self._beside

    @property
    def _beside(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial-{self._run}")

    def _check_space(self, sizes: list[int]) -> None:
        """Compares whole blocks, which are what files take, and the number of files."""
        room = os.statvfs(self.partial.path)
        block = room.f_frsize or room.f_bsize or 1
        needed = sum(-(-size // block) * block for size in sizes)
        free = room.f_bavail * block
        # Some file systems have no limit, and mounts of stores know no size: they say 0.
        if room.f_blocks and needed > free:
            raise DestinationError(
                errno.ENOSPC,
                f"the conversion writes {needed:,} bytes in blocks of {block:,}, and {free:,} "
                "are free",
                str(self.path),
            )
        if room.f_files and len(sizes) > room.f_favail:
            raise DestinationError(
                errno.ENOSPC,
                f"the conversion writes {len(sizes):,} files, and the file system has room for "
                f"{room.f_favail:,}",
                str(self.path),
            )

    def commit(
        self, outputs: Sequence[OutputFile], *, fsync: bool, names: Collection[str] = ()
    ) -> list[str]:
        """Gives the result its name. What `overwrite` replaces is there until then.

        Args:
            outputs: the files that must be there, in their full sizes.
            names: paths of the small files.

        Returns warnings. Raises DestinationError, OSError.
        """
        partial = self.partial
        if fsync:
            for folder, _, _ in os.walk(partial.content_path):
                sync(Path(folder))
        with held():
            self.check(names)
            self._check_ours(outputs)
            if self.is_inside:
                placing.move_up(partial, self.path, self._entries(), fsync=fsync)
            elif self.path.exists() and os.listdir(self.path):
                placing.replace(partial, self.path)
            else:
                placing.give_name(partial, self.path)
            self._is_whole = True
        if fsync:
            parent = self.path if self.is_inside else self.path.parent
            while parent != self._oldest_parent:
                sync(parent)
                parent = parent.parent
            sync(parent)
        return self._end()

    def _check_ours(self, outputs: Sequence[OutputFile]) -> None:
        """What was written is what is about to be given a name."""
        assert self._lock is not None
        self._lock.check()
        if not self.partial.is_in_place():
            raise DestinationError(
                f"{self.partial.path}: it is not the folder any more that was written to"
            )
        for output in outputs:
            found = self.partial.content.size_of(output.path)
            if found != output.size_bytes:
                has = "it is not there" if found is None else f"it has {found:,} bytes"
                raise DestinationError(
                    f"{self.partial.content_path / output.path}: {has}, and {output.size_bytes:,} "
                    "were written: something else has changed it"
                )

    def _end(self) -> list[str]:
        """Removes what is not needed any more; that it cannot be removed is no error."""
        warnings: list[str] = []
        self.partial.close()
        try:
            remove(self.partial.path)
        except OSError as error:
            warnings.append(
                f"{self.partial.path} cannot be removed, and is not needed: {error.strerror}"
            )
        assert self._lock is not None
        self._lock.release()
        return warnings

    def leave(self) -> None:
        """Ends a share: what it has written stays, for the run that finishes."""
        self.partial.close()
        if self._lock is not None:
            self._lock.release()

    def abort(self, *, keeps: bool = False, only: Collection[str] | None = None) -> None:
        """Ends a run before its time.

        Args:
            keeps: what was written so far stays, for a run that goes on with it.
            only: paths of the files that stay then; by default all.
        """
        with ending():
            partial = self._partial
            if partial is not None:
                self._lost = None if self._is_whole else self._found_lost(partial)
                is_mine = self._lock is not None and self._lost is None
                if only is not None and keeps and is_mine and not self._is_whole:
                    with contextlib.suppress(OSError):
                        partial.keep_only(only)
                partial.close()
                # What was replaced may take its time to remove.
                has_old = self._is_whole and partial.content_path.exists()
                if is_mine and not has_old and not (keeps and not self._is_whole):
                    with contextlib.suppress(OSError):
                        remove(partial.path)
            if self._lock is not None:
                self._lock.release()
                if not self._is_whole:
                    self._remove_parents()

    def _found_lost(self, partial: Partial) -> str | None:
        """What has become of what this run wrote, in words; None where it is there, and its own."""
        with contextlib.suppress(OSError):
            taker = None if self._lock is None else self._lock.taker()
            if taker is not None:
                return (
                    f"another conversion has {self.path} now, since nothing was heard of this one: "
                    f"{taker}; what this one wrote is that one's"
                )
        if partial.is_in_place():
            return None
        return f"something has moved or removed {partial.path}, to which this one wrote"

    @property
    def is_lost(self) -> bool:
        """Whether what this run wrote is not its own any more: known after `abort`."""
        return self._lost is not None

    def _remove_parents(self) -> None:
        """Those that were made for this result, where nobody else has put anything into them."""
        parent = self.path.parent
        while parent != self._oldest_parent:
            try:
                parent.rmdir()
            except OSError:
                return
            parent = parent.parent

    def remains(self, number: int, total: int, again: str) -> str:
        """What is there after an end before time, in words.

        Args:
            number, total: output files that are whole, and all of them.
            again: what may be done with them.
        """
        if self._lost is not None:
            return self._lost
        if self._is_whole:
            left = self._partial is not None and self._partial.path.exists()
            more = f", and {self.partial.path} can be deleted" if left else ""
            return f"{self.path} is whole{more}"
        if self._partial is None or not self._partial.path.exists():
            return f"{self.path} is as it was"
        return (
            f"{self.path} is as it was, and {number:,} of {total:,} files are whole in "
            f"{self._partial.path}: {again}"
        )


def _identities(path: Path) -> list[tuple[int, int] | Path]:
    """A path and all that it lies in: device and inode, or the name of what is not there."""
    found: list[tuple[int, int] | Path] = []
    for each in (path, *path.parents):
        try:
            status = os.stat(each)
        except OSError:
            found.append(each)
        else:
            found.append((status.st_dev, status.st_ino))
    return found
