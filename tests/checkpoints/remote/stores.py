"""Stores for tests: one in memory whose requests fail as a test asks, and what lies in any of them.

A URL of it is `faulty://bucket/folder`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class FaultyFileSystem(MemoryFileSystem):
    """A file system in memory. What it does is noted, and may fail."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    # (path, begin, end) of each read, and the most that ran at once.
    reads: ClassVar[list[tuple[str, int, int]]] = []
    most_at_once: ClassVar[int] = 0
    running: ClassVar[int] = 0
    lock: ClassVar[threading.Lock] = threading.Lock()
    # Called before each; may raise, wait, or change what is there. Its result stands for the data.
    on_read: ClassVar[Callable[[str, int, int], bytes | None] | None] = None
    on_write: ClassVar[Callable[[str], None] | None] = None
    on_remove: ClassVar[Callable[[str], None] | None] = None

    @classmethod
    def clear(cls) -> None:
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.reads.clear()
        cls.most_at_once = cls.running = 0
        cls.on_read = cls.on_write = cls.on_remove = None

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        return super()._strip_protocol(path.removeprefix("faulty://"))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **more: Any) -> bytes:
        cls = type(self)
        with cls.lock:
            cls.reads.append((path, start, end))
            cls.running += 1
            cls.most_at_once = max(cls.most_at_once, cls.running)
        try:
            instead = cls.on_read(path, start, end) if cls.on_read is not None else None
            return super().cat_file(path, start, end) if instead is None else instead
        finally:
            with cls.lock:
                cls.running -= 1

    def put_file(self, lpath: str, rpath: str, **more: Any) -> None:
        if type(self).on_write is not None:
            type(self).on_write(rpath)
        super().put_file(lpath, rpath)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **more: Any) -> None:
        if type(self).on_write is not None:
            type(self).on_write(path)
        super().pipe_file(path, value)

    def rm_file(self, path: str) -> None:
        if type(self).on_remove is not None:
            type(self).on_remove(path)
        super().rm_file(path)


def put(folder: Path, url: str) -> str:
    """Copies a folder into a store."""
    fs, root = fsspec.url_to_fs(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            fs.pipe_file(f"{root}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return url


def contents(place: str | Path) -> dict[str, bytes]:
    """Every file of a folder, in a store or on a disk."""
    if isinstance(place, Path):
        return {
            path.relative_to(place).as_posix(): path.read_bytes()
            for path in place.rglob("*")
            if path.is_file()
        }
    fs, root = fsspec.url_to_fs(place)
    fs.invalidate_cache()
    root = root.lstrip("/")
    return {path.lstrip("/")[len(root) + 1 :]: fs.open(path, "rb").read() for path in fs.find(root)}


def fail_first(count: int, error: Callable[[], BaseException]) -> Callable[..., None]:
    """What fails so often, and then no more."""
    left = [count]

    def fail(*_: Any) -> None:
        if left[0] > 0:
            left[0] -= 1
            raise error()

    return fail


def slow(seconds: float) -> Callable[..., None]:
    """What takes its time."""
    return lambda *_: time.sleep(seconds)
