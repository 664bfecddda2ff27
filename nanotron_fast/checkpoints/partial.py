"""The folder that a run writes to, and what dead runs have left of theirs.

    out.partial-0a1b2c3d/     beside the destination, or .nanotron_fast.partial-0a1b2c3d/ within it
      journal-0               of each process: what it has finished
      content/                what becomes the destination
      commit                  while the content takes its place: what moves where
      replaced/               what was in its place, where the two cannot exchange their names

The name is the run's own. A run holds its folder open, and creates files under the open folder
alone: whatever becomes of the name, it never writes to another run's files, nor another to its.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanotron_fast.checkpoints.claims import LOCK
from nanotron_fast.checkpoints.journal import Entry, Journal, Record, read_record
from nanotron_fast.checkpoints.small_files import write_file
from nanotron_fast.formats.plain_file import is_file_name, read_small
from nanotron_fast.moves.files import Folder
from nanotron_fast.moves.plan import OutputFile

CONTENT, COMMIT, REPLACED = "content", "commit", "replaced"
_RUN = r"[0-9a-f]{8}"
_MAX_COMMIT_BYTES = 16 << 20
_MAX_NAME_BYTES = 255


def new_run() -> str:
    """A name that no other run has."""
    return os.urandom(4).hex()


class Partial:
    """The folder of this run, held open by each of its processes."""

    def __init__(self, path: Path, folder: Folder) -> None:
        self.path = path
        self.folder = folder
        self.content = Folder.open(Path(CONTENT), within=folder)

    @classmethod
    def create(cls, path: Path) -> Partial:
        """Makes it. Raises OSError."""
        path.mkdir()
        folder = Folder.open(path)
        folder.make_folders([CONTENT])
        return cls(path, folder)

    @classmethod
    def join(cls, path: Path) -> Partial:
        """That which another process has made. Raises OSError."""
        return cls(path, Folder.open(path))

    @property
    def content_path(self) -> Path:
        """Where the files are."""
        return self.path / CONTENT

    def is_in_place(self) -> bool:
        """Whether the folder of this name is still the one that is held."""
        try:
            found = os.stat(self.content_path, follow_symlinks=False)
        except OSError:
            return False
        return os.path.samestat(found, os.fstat(self.content.descriptor))

    def mark(self, parts: Iterable[str] = (), before: Iterable[str] = ()) -> None:
        """Notes that the content is about to take its place: see `Leftover.undo`. Raises OSError.

        Args:
            parts: names in the content that move up one by one.
            before: names that are moved aside.
        """
        inode = os.fstat(self.content.descriptor).st_ino
        document = {"content": inode, "parts": list(parts), "before": list(before)}
        write_file(Path(COMMIT), json.dumps(document).encode(), fsync=True, within=self.folder)

    def keep_only(self, paths: Collection[str]) -> None:
        """Removes all other files: a journal is believed of none that is gone. Raises OSError."""
        for folder, _, names, descriptor in os.fwalk(".", dir_fd=self.content.descriptor):
            for name in names:
                if os.path.normpath(os.path.join(folder, name)) not in paths:
                    os.unlink(name, dir_fd=descriptor)

    def close(self) -> None:
        """Lets go of it. May be called again."""
        self.content.close()
        self.folder.close()


@dataclass(frozen=True, slots=True)
class Leftover:
    """The folder of another run.

    Args:
        destination: that it is for.
        run: its name.
        record: what its journals say.
        commit: what its mark says; None where it has none.
        sizes: bytes of the files that its journals say are whole, as they are there.
    """

    path: Path
    destination: Path
    run: str
    record: Record
    commit: Mapping[str, Any] | None
    sizes: Mapping[str, int | None] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, destination: Path, run: str) -> Leftover | None:
        """What is there; None where no run has made it. Raises OSError."""
        if path.is_symlink() or not path.is_dir():
            return None
        with Folder.open(path) as folder:
            names = set(os.listdir(folder.descriptor))
            commit = _read_commit(path)
            if not _is_made_by_a_run(folder, names, commit):
                return None
            # What a link leads to is nobody's to move.
            if any((path / name).is_symlink() for name in (CONTENT, REPLACED)):
                return None
            record = read_record(folder)
            sizes: dict[str, int | None] = {}
            if CONTENT in names:
                with Folder.open(Path(CONTENT), within=folder) as content:
                    sizes = {name: content.size_of(name) for name in record.entries}
        return cls(path, destination, run, record, commit, sizes)

    @property
    def finished(self) -> dict[str, Entry]:
        """The files that are whole, as far as their sizes say."""
        if self.is_placed:
            return {}
        entries = self.record.entries
        return {name: each for name, each in entries.items() if self.sizes.get(name) == each.size}

    @property
    def is_placed(self) -> bool:
        """Whether its content took its place before the run ended."""
        content = self.path / CONTENT
        if self.commit is None:
            return False
        if not content.exists():
            return self.destination.exists()
        if self.commit["parts"]:
            return not any(os.path.lexists(content / name) for name in self.commit["parts"])
        return content.stat().st_ino != self.commit["content"]

    def undo(self) -> None:
        """Puts everything back where it was before the content began to move. Raises OSError."""
        if self.commit is None or self.is_placed:
            return
        content, replaced = self.path / CONTENT, self.path / REPLACED
        for name in self.commit["parts"]:
            if os.path.lexists(self.destination / name) and not os.path.lexists(content / name):
                (self.destination / name).rename(content / name)
        if not self.commit["parts"] and replaced.exists() and not self.destination.exists():
            replaced.rename(self.destination)
            for name in os.listdir(self.destination):
                if name.startswith(LOCK):  # that of the run that moved it aside
                    (self.destination / name).unlink()
        for name in self.commit["before"]:
            if os.path.lexists(replaced / name):
                (replaced / name).rename(self.destination / name)
        (self.path / COMMIT).unlink()

    @property
    def is_between(self) -> bool:
        """Whether the run ended while its content took its place: see `undo`."""
        return self.commit is not None and not self.is_placed

    def hand_over(
        self, files: Mapping[str, Entry], partial: Partial, journal: Journal, taken: set[str]
    ) -> None:
        """Moves files to the folder of this run, and adds the path of each to `taken`.

        Each is noted before it moves: of a file that is not there, a journal is not believed.
        Raises OSError.
        """
        with (
            Folder.open(self.path) as folder,
            Folder.open(Path(CONTENT), within=folder) as content,
        ):
            partial.content.make_folders({os.path.dirname(name) for name in files})
            for name, entry in files.items():
                journal.adopt({name: entry})
                try:
                    os.rename(
                        name,
                        name,
                        src_dir_fd=content.descriptor,
                        dst_dir_fd=partial.content.descriptor,
                    )
                except OSError as error:
                    error.filename = os.fspath(content.path / name)
                    error.filename2 = None
                    raise
                taken.add(name)

    def remove(self) -> None:
        """Removes it. Raises OSError."""
        remove(self.path)


def remove(path: Path) -> None:
    """Removes the folder of a run: its journals last, by which it is known. Raises OSError."""
    for name in (CONTENT, REPLACED):
        if (path / name).exists():
            shutil.rmtree(path / name)
    shutil.rmtree(path)


def whole_outputs(
    leftover: Leftover, outputs: Iterable[OutputFile], boots: Iterable[str]
) -> dict[str, Entry]:
    """The outputs of a plan that another run has finished, and whose bytes are sure to be there.

    Args:
        boots: of the machines that go on.
    """
    finished, known = leftover.finished, set(boots)
    found: dict[str, Entry] = {}
    for output in outputs:
        entry = finished.get(output.path)
        if entry is not None and entry.size == output.size_bytes and entry.counts(known):
            found[output.path] = entry
    return found


def leftovers(destination: Path) -> list[Leftover]:
    """What other runs have left beside a destination and within it. Raises OSError."""
    found: list[Leftover] = []
    beside = re.compile(re.escape(destination.name) + rf"\.partial-({_RUN})")
    within = re.compile(rf"\.nanotron_fast\.partial-({_RUN})")
    for folder, pattern in ((destination.parent, beside), (destination, within)):
        if not folder.is_dir():
            continue
        for name in sorted(os.listdir(folder)):
            match = pattern.fullmatch(name)
            if match is not None:
                leftover = Leftover.read(folder / name, destination, match[1])
                if leftover is not None:
                    found.append(leftover)
    return found


def between(destination: Path) -> str | None:
    """Where a checkpoint lies that a run was replacing when it ended, and how it comes back.

    None where no run has ended so, as far as can be seen.
    """
    try:
        found = [each for each in leftovers(Path(os.path.realpath(destination))) if each.is_between]
    except OSError:
        return None
    for leftover in found:
        replaced = leftover.path / REPLACED
        again = "the next conversion to it, as one with --overwrite --resume, which then goes on"
        if leftover.commit is not None and leftover.commit["parts"]:
            where = f"; what was in it before lies in {replaced}" if replaced.is_dir() else ""
            return (
                f"a conversion ended while its files took their places in {destination}{where}: "
                f"{again}, first puts all back"
            )
        if replaced.is_dir() and not destination.exists():
            return (
                f"a conversion ended while its result took this name, and the checkpoint that had "
                f"it lies in {replaced}: mv {shlex.quote(str(replaced))} "
                f"{shlex.quote(str(leftover.destination))} gives it back, and so does {again}"
            )
    return None


def _is_made_by_a_run(folder: Folder, names: set[str], commit: Mapping[str, Any] | None) -> bool:
    """Whether nothing else can have made it: not for its name alone is a folder swept away."""
    others = {name for name in names if not _is_journal(name)}
    if others - {CONTENT, COMMIT, REPLACED}:
        return False
    if others < names or commit is not None or not names:
        return True
    # A run may be killed before it has a journal.
    return names == {CONTENT} and not os.listdir(folder.path / CONTENT)


def _is_journal(name: str) -> bool:
    return re.fullmatch(r"journal-\d+", name) is not None


def _is_name(name: object) -> bool:
    """Whether it names something in a folder, as a file system has names."""
    if not is_file_name(name):
        return False
    try:
        return len(os.fsencode(name)) <= _MAX_NAME_BYTES
    except UnicodeEncodeError:  # half a surrogate pair
        return False


def _read_commit(path: Path) -> Mapping[str, Any] | None:
    try:
        if (path / COMMIT).stat().st_size > _MAX_COMMIT_BYTES:
            return None
        document = json.loads(read_small(path / COMMIT))
        is_right = isinstance(document["content"], int) and all(
            isinstance(document[key], list) and all(map(_is_name, document[key]))
            for key in ("parts", "before")
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return document if is_right else None
