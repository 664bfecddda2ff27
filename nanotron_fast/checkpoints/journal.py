"""What a run has finished, noted while it works, so that another can go on from there.

A journal is a file of JSON lines. The first says what is made, and of what; each further one names
a file that is whole, or a part of one that several processes write: that one is whole when the
parts in all journals make it up. A line counts only where its file was synced before it, or where
the machine that wrote it has not been started again since: a crash may take with it what was not
synced.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from nanotron_fast.checkpoints.cut_files import are_whole
from nanotron_fast.checkpoints.fingerprint import Made
from nanotron_fast.checkpoints.owners import boot_id
from nanotron_fast.checkpoints.small_files import naming, write_all
from nanotron_fast.interruption import held
from nanotron_fast.moves.files import Folder
from nanotron_fast.moves.plan import OutputFile

_PREFIX = "journal-"
_MAX_BYTES = 256 << 20
# More shares than anybody makes.
_MAX_SHARES = 1 << 16
# A file's name, and a path, of Linux.
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 4095
# The end of the year 9999, which is as far as a time can be told.
_MAX_SECONDS = 253402300799
_POLL_SECONDS = 0.1
# How long an ended run waits for the device.
_LAST_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that is whole: its bytes, whether the device has it, and when: of which boot.

    `sha256` has the digests for a manifest, in hexadecimal, or nothing. `part`: that only the bytes
    from the first number up to the second are there.
    """

    size: int
    is_synced: bool
    boot: str
    sha256: tuple[str, ...] = ()
    part: tuple[int, int] | None = None

    def counts(self, boots: Collection[str]) -> bool:
        """Whether its bytes are sure to be there. `boots` are those of the machines that ask."""
        return self.is_synced or (bool(self.boot) and self.boot in boots)


@dataclass(frozen=True, slots=True)
class Record:
    """All journals of a folder: what was made there, and which files are whole."""

    made: Made | None
    share: tuple[int, int] | None = None
    begun: float = 0.0
    entries: Mapping[str, Entry] = field(default_factory=dict)


class Journal:
    """The journal of a process.

    Args:
        folder: that it lies in.
        content: the folder that the files are in.
        rank: of the process.
        syncs: each file is synced before it is noted, on a thread.
    """

    def __init__(self, folder: Folder, content: Folder, rank: int, *, syncs: bool) -> None:
        self._content = content
        self._path = folder.path / f"{_PREFIX}{rank}"
        self._descriptor = folder.create(f"{_PREFIX}{rank}")
        self._boot = boot_id()
        self._digests: dict[str, tuple[str, ...]] = {}
        self._queue: queue.Queue[Sequence[OutputFile] | None] = queue.Queue()
        self._errors: list[OSError] = []
        self._thread: threading.Thread | None = None
        if syncs:
            self._thread = threading.Thread(
                target=self._sync_all, name="nanotron_fast-journal", daemon=True
            )
            self._thread.start()

    def begin(self, made: Made, share: tuple[int, int] | None, begun: float) -> None:
        """Writes what the run is."""
        document = {"made": made.to_json(), "share": share, "begun": begun}
        self._write([document])

    def adopt(self, entries: Mapping[str, Entry]) -> None:
        """Notes what is finished: by other runs, as they have noted it."""
        self._write(
            {
                "file": name,
                "size": each.size,
                "synced": each.is_synced,
                "boot": each.boot,
                **({"sha256": each.sha256} if each.sha256 else {}),
                **({"part": each.part} if each.part else {}),
            }
            for name, each in entries.items()
        )

    def keep(self, path: str, sha256: Sequence[str]) -> None:
        """Takes the digests of a file that is about to be added."""
        self._digests[path] = tuple(sha256)

    def add(self, outputs: Sequence[OutputFile]) -> None:
        """Notes that files, or parts of files, are whole. Raises OSError, of an earlier one too."""
        if self._errors:
            raise self._errors[0]
        if self._thread is None:
            self._note(outputs, is_synced=False)
        else:
            self._queue.put(outputs)

    def _note(self, outputs: Iterable[OutputFile], *, is_synced: bool) -> None:
        self.adopt(
            {
                each.path: Entry(
                    each.size_bytes,
                    is_synced,
                    self._boot,
                    self._digests.pop(each.path, ()),
                    each.part,
                )
                for each in outputs
            }
        )

    def _sync_all(self) -> None:
        while (outputs := self._queue.get()) is not None:
            try:
                for output in outputs:
                    self._content.sync(output.path)
                self._note(outputs, is_synced=True)
            except OSError as error:  # told by the next call
                self._errors.append(error)

    def _write(self, documents: Iterable[Mapping[str, Any]]) -> None:
        lines = b"".join(json.dumps(each).encode() + b"\n" for each in documents)
        write_all(self._descriptor, lines, self._path)

    def finish(self) -> None:
        """Returns when all is noted. Raises OSError."""
        if self._thread is not None:
            self._queue.put(None)
            while self._thread.is_alive():
                with held():  # a signal is answered between two of them
                    self._thread.join(_POLL_SECONDS)
            self._thread = None
            with naming(self._path):
                os.fsync(self._descriptor)
        if self._errors:
            raise self._errors[0]

    def close(self) -> None:
        """Ends it as it is. May be called again."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(_LAST_SECONDS)
            # What a slow device has not taken by then is done again.
            if self._thread.is_alive():
                return
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_record(folder: Folder) -> Record:
    """All journals of a folder; what cannot be read of them says nothing. Raises OSError."""
    record = Record(None)
    entries: dict[str, Entry] = {}
    parts: dict[str, list[Entry]] = {}
    names = [name for name in os.listdir(folder.descriptor) if name.startswith(_PREFIX)]
    for name in sorted(names):
        for document in _documents(folder, name):
            if "file" in document:
                name, entry = document["file"], _entry(document)
                if entry is None or not _lies_within(name):
                    continue
                if entry.part is None:
                    entries[name] = entry
                else:
                    parts.setdefault(name, []).append(entry)
            elif record.made is None:
                made = Made.parse(document.get("made"))
                begun = document.get("begun")
                record = Record(made, _share(document.get("share")), _time(begun))
    for name, each in parts.items():
        whole = _joined(each)
        if whole is not None:
            entries.setdefault(name, whole)
    return Record(record.made, record.share, record.begun, entries)


def _joined(parts: Sequence[Entry]) -> Entry | None:
    """The whole file that parts make up; None where they do not."""
    first = parts[0]
    is_whole = are_whole([each.part for each in parts if each.part is not None], first.size)
    if not is_whole or any(each.size != first.size for each in parts):
        return None
    is_same = all(each.boot == first.boot for each in parts)
    is_synced = all(each.is_synced for each in parts)
    return Entry(first.size, is_synced, first.boot if is_same else "")


def _documents(folder: Folder, name: str) -> Iterable[dict[str, Any]]:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=folder.descriptor)
    with open(descriptor, "rb") as file:
        if os.fstat(descriptor).st_size > _MAX_BYTES:
            return
        for line in file:
            try:
                document = json.loads(line)
            except (ValueError, RecursionError):  # the last one, which was being written
                continue
            if isinstance(document, dict):
                yield document


def _time(found: object) -> float:
    if isinstance(found, int | float) and 0 <= found <= _MAX_SECONDS:
        return float(found)
    return 0.0


def _share(found: object) -> tuple[int, int] | None:
    if isinstance(found, list) and [type(each) for each in found] == [int, int]:
        number, total = found
        if 1 <= number <= total <= _MAX_SHARES:
            return number, total
    return None


def _lies_within(name: object) -> TypeGuard[str]:
    """Whether it is a path of a file in the folder."""
    if not isinstance(name, str) or "\x00" in name:
        return False
    try:
        raw = name.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    parts = raw.split(b"/")
    return len(raw) <= _MAX_PATH_BYTES and all(
        part not in (b"", b".", b"..") and len(part) <= _MAX_NAME_BYTES for part in parts
    )


def _entry(document: Mapping[str, Any]) -> Entry | None:
    size, is_synced, boot = (document.get(key) for key in ("size", "synced", "boot"))
    if not (isinstance(size, int) and isinstance(is_synced, bool) and isinstance(boot, str)):
        return None
    sha256 = document.get("sha256", [])
    if not (isinstance(sha256, list) and all(isinstance(each, str) for each in sha256)):
        return None
    part = document.get("part")
    if part is None:
        return Entry(size, is_synced, boot, tuple(sha256))
    if not (isinstance(part, list) and [type(each) for each in part] == [int, int]):
        return None
    return Entry(size, is_synced, boot, tuple(sha256), (part[0], part[1]))
