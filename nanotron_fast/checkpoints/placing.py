"""How a finished folder takes its place: under a free name, instead of another, or part by part.

Each can be undone by the next run where this one is killed in between: `Leftover.undo`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from nanotron_fast.checkpoints.partial import REPLACED, Partial
from nanotron_fast.checkpoints.renaming import exchange, rename_to_free
from nanotron_fast.checkpoints.small_files import sync
from nanotron_fast.formats.known_files import MARKERS


def give_name(partial: Partial, path: Path) -> None:
    """Gives the content a name that is free, or that of an empty folder. Raises OSError."""
    if path.exists():
        partial.content_path.rename(path)
    else:
        rename_to_free(partial.content_path, path)


def replace(partial: Partial, path: Path) -> None:
    """A checkpoint that was there changes its name with the content. Raises OSError."""
    partial.mark()
    if exchange(partial.content_path, path):
        return
    # The other way, in which the name is free for a moment.
    aside = partial.path / REPLACED
    path.rename(aside)
    try:
        partial.content_path.rename(path)
    except BaseException:
        aside.rename(path)
        raise


def move_up(partial: Partial, path: Path, before: Sequence[str], *, fsync: bool) -> None:
    """Moves what was in a folder aside, and the parts of the content up; on an error, all back.

    Args:
        path: the folder, which the partial lies in.
        before: names of what was there.
        fsync: all parts but the last, which marks a whole checkpoint, are on the device before it.

    Raises OSError.
    """
    content, replaced = partial.content_path, partial.path / REPLACED
    parts = sorted(os.listdir(content), key=_order)
    partial.mark(parts, before)
    done: list[tuple[Path, Path]] = []
    try:
        if before:
            replaced.mkdir()
        for name in before:
            done.append(_move(path / name, replaced / name))
        for name in parts:
            if fsync and name == parts[-1]:
                sync(path)
            done.append(_move(content / name, path / name))
    except BaseException:
        for there, here in reversed(done):
            here.rename(there)
        raise


def take_after(old: Path, new: Path) -> None:
    """Gives a folder the owner, mode and access lists of the one that it will replace.

    Files that are made in it then belong to the same group. Raises OSError.
    """
    status, mine = old.stat(), new.stat()
    if (mine.st_uid, mine.st_gid) != (status.st_uid, status.st_gid):
        os.chown(new, status.st_uid, status.st_gid)
    shutil.copystat(old, new)


def _order(name: str) -> tuple[int, str]:
    """Weights and what goes with them first, the marks of a whole checkpoint last."""
    return (MARKERS.index(name) + 1 if name in MARKERS else 0, name)


def _move(here: Path, there: Path) -> tuple[Path, Path]:
    here.rename(there)
    return here, there
