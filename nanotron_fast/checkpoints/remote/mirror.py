"""A local folder that looks like a checkpoint in a store, and takes next to no room.

Small files are there. Of a tensor file there is the header, and a hole as long as the tensors:
whoever plans sees what he would see in a copy. Before bytes of tensors are read they are fetched
to where they lie in that file, and afterwards let go of; `running.py` sees to that, range by range.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from nanotron_fast.checkpoints.remote.store import BLOCK_BYTES, Store, Version, at_once
from nanotron_fast.errors import CheckpointError, NanotronFastError
from nanotron_fast.formats.huggingface import companions
from nanotron_fast.formats.huggingface.checkpoint import CONFIG
from nanotron_fast.formats.json_file import read_json_object
from nanotron_fast.formats.nanotron.checkpoint import LATEST, MODEL_CONFIG
from nanotron_fast.formats.patterns import matches

# Weights in the original authors' own layout are left alone.
_NOT_FETCHED = (*companions.IGNORED_ON_HUB, "consolidated*")
_TENSORS = ".safetensors"
# The header of a Nanotron file, and of many others. Longer ones take a second request.
_FIRST_BYTES = 4096
_MAX_HEADER_BYTES = 100_000_000

# Byte ranges of a file: from, and to without it.
Ranges = Sequence[tuple[int, int]]


class Mirror:
    """What stands for a folder of a store. Its files have the versions that they had when seen.

    Args:
        store: the folder.
        with_tensors: fetch the headers of tensor files, too.
    """

    def __init__(self, store: Store, *, with_tensors: bool = True) -> None:
        """Raises CheckpointError, OSError."""
        import tempfile

        self.store = store
        self.root = Path(tempfile.mkdtemp(prefix="nanotron_fast-mirror-")).resolve()
        self._remove = weakref.finalize(self, shutil.rmtree, self.root, ignore_errors=True)
        self._header_bytes: dict[str, int] = {}
        _open[self.root] = self
        _urls[str(self.root)] = store.url
        try:
            with shown_in_errors():
                self._fill(with_tensors)
        except BaseException:
            self.close()
            raise

    def _fill(self, with_tensors: bool) -> None:
        self._versions = self.store.files()
        if not self._versions:
            raise CheckpointError(f"{self.store.url}: there is nothing")
        for name, version in self._versions.items():
            self._make_hollow(name, version.size_bytes)
        self._fetch(self._wanted_at_first())
        self._fetch(self._wanted_by_name())
        if with_tensors:
            tensors = [name for name in self._versions if name.endswith(_TENSORS)]
            at_once(partial(self._fetch_header, name) for name in tensors)

    def _make_hollow(self, name: str, size: int) -> None:
        path = self.root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:
                file.truncate(size)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise CheckpointError(
                f"{self.store.name_of(name)}: it is a file and a folder at once, which no folder "
                "on a disk can have"
            ) from None

    def _wanted_at_first(self) -> list[str]:
        return [
            name
            for name, version in self._versions.items()
            if not matches(name, _NOT_FETCHED)
            and not name.endswith(_TENSORS)
            and version.size_bytes <= companions.MAX_BYTES
        ]

    def _wanted_by_name(self) -> list[str]:
        """What the configurations name of the rest, as from the Hub."""
        path = self.root / CONFIG
        config = read_json_object(path) if path.is_file() else None
        patterns = companions.wanted_from_hub(self.root, config)
        return [
            name
            for name, version in self._versions.items()
            if matches(name, patterns) and version.size_bytes <= companions.MAX_BYTES
        ]

    def _fetch(self, names: Iterable[str]) -> None:
        """Fetches whole files."""
        at_once(
            call
            for name in names
            for call in self._calls(name, [(0, self._versions[name].size_bytes)])
        )

    def _fetch_header(self, name: str) -> int:
        if not self._versions[name].has_tag:
            self._versions[name] = self._versions[name]._replace(
                marks=self.store.version(name).marks
            )
        size = self._versions[name].size_bytes
        first = self.store.read(name, 0, min(size, _FIRST_BYTES)) if size else b""
        end = 8 + int.from_bytes(first[:8], "little") if len(first) >= 8 else size
        # What is no header is left for the reader to refuse, as it would be in a copy.
        end = min(end, size) if end <= _MAX_HEADER_BYTES else min(size, _FIRST_BYTES)
        data = first[:end]
        if end > len(first):
            data += self.store.read(name, len(first), end)
        self._put(name, 0, data)
        # A change of the version changes it, too, for whoever asks whether a source is the same.
        time = self._versions[name].digest
        os.utime(self.root / name, ns=(time, time))
        self._header_bytes[name] = end
        return end

    def _put(self, name: str, offset: int, data: bytes) -> int:
        descriptor = os.open(self.root / name, os.O_WRONLY | os.O_CLOEXEC)
        try:
            view = memoryview(data)
            while view:
                done = os.pwrite(descriptor, view, offset)
                view, offset = view[done:], offset + done
        finally:
            os.close(descriptor)
        return len(data)

    def _calls(self, name: str, ranges: Ranges) -> Iterator[Callable[[], int]]:
        """Requests of bounded size for ranges of a file."""

        def fetch(begin: int, end: int) -> int:
            return self._put(name, begin, self.store.read(name, begin, end))

        for begin, end in ranges:
            for start in range(begin, end, BLOCK_BYTES):
                yield partial(fetch, start, min(start + BLOCK_BYTES, end))

    @contextlib.contextmanager
    def holding(self, ranges: Mapping[str, Ranges]) -> Iterator[None]:
        """Fetches ranges of tensor files, by their names, and lets go of them at the end.

        Raises CheckpointError where a file is no longer what it was when its header was read,
        OSError where it cannot be read or there is no room for it.
        """
        before = {name: os.stat(self.root / name) for name in ranges}
        try:
            at_once(call for name, each in ranges.items() for call in self._calls(name, each))
            # Afterwards: what has been read was written before any change that this would miss.
            at_once(partial(self.check, name) for name in ranges)
            for name, status in before.items():
                self._set_time(name, status)
            yield
        finally:
            for name, status in before.items():
                self._empty(name)
                self._set_time(name, status)

    def check(self, name: str) -> int:
        """Raises CheckpointError where a file is not any more what it was; OSError. Returns 0."""
        self.store.check_unchanged(name, self._versions[name])
        return 0

    def check_whole(self, name: str) -> int:
        """Does what `check` does for a small file, all of which lies here."""
        if self._versions[name].has_tag:
            return self.check(name)
        # The time of a listing may be less exact than that of the file: its bytes are compared.
        here = (self.root / name).read_bytes()
        self.store.check_unchanged(name, Version(len(here), {}))
        if self.store.read(name, 0, len(here)) != here:
            raise CheckpointError(
                f"{self.store.name_of(name)}: it has changed since the conversion was planned"
            )
        return 0

    def _empty(self, name: str) -> None:
        path = self.root / name
        with contextlib.suppress(FileNotFoundError):
            os.truncate(path, self._header_bytes.get(name, 0))
            os.truncate(path, self._versions[name].size_bytes)

    def _set_time(self, name: str, status: os.stat_result) -> None:
        """Makes it look untouched: whoever watches files would see a change of ours."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.root / name, ns=(status.st_atime_ns, status.st_mtime_ns))

    def close(self) -> None:
        """Removes the folder."""
        _open.pop(self.root, None)
        self._remove()


# Those that there are, by their folders.
_open: dict[Path, Mirror] = {}
# What the user knows them by: reports speak of those that are closed.
_urls: dict[str, str] = {}


def mirror(url: str, *, with_tensors: bool = True) -> Path:
    """A folder that stands for a checkpoint in a store: of a folder of training steps, the latest.

    Raises CheckpointError, ConfigError, OSError.
    """
    store = Store.at(url)
    top = store.files(in_folders=False)
    if LATEST in top and MODEL_CONFIG not in top:
        text = store.read(LATEST, 0, min(top[LATEST].size_bytes, 80)).decode(errors="replace")
        if not text.strip().isdecimal():
            raise CheckpointError(
                f"{store.name_of(LATEST)}: it points to {text!r}, which is not a step beside it"
            )
        store = store.child(text.strip())
    return Mirror(store, with_tensors=with_tensors).root


def mirror_of(path: Path) -> tuple[Mirror, str] | None:
    """The mirror that a file lies in, and its name there."""
    for root, each in _open.items():
        if path.is_relative_to(root):
            return each, path.relative_to(root).as_posix()
    return None


@contextlib.contextmanager
def mirrors_closed() -> Iterator[None]:
    """Removes the mirrors that are made meanwhile. Errors name the URLs."""
    before = set(_open)
    try:
        with shown_in_errors():
            yield
    finally:
        for root in set(_open) - before:
            _open[root].close()


def shown(text: str | Path) -> str:
    """A text in which the folders of mirrors have the names that the user knows."""
    text = str(text)
    for root, url in _urls.items():
        text = text.replace(root, url)
    return text


@contextlib.contextmanager
def shown_in_errors() -> Iterator[None]:
    """Errors name what the user knows."""
    try:
        yield
    except (NanotronFastError, OSError) as error:
        if _urls:
            error.args = tuple(
                shown(each) if isinstance(each, str) else each for each in error.args
            )
            if isinstance(error, OSError) and isinstance(error.filename, str):
                error.filename = shown(error.filename)
        raise
