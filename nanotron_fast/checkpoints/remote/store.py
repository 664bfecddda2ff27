"""A folder in an object store, on the Hub, or wherever else fsspec reaches: `s3://bucket/model`.

Every request is tried again with growing pauses, a body that ends early like one that fails. At
most `NUM_AT_A_TIME` requests run at once, each for `BLOCK_BYTES` at most, so memory is bounded.
fsspec is imported when a URL is given, and not before.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from nanotron_fast.checkpoints.remote.packages import package_for, require_store
from nanotron_fast.checkpoints.remote.reason import reason
from nanotron_fast.checkpoints.remote.refusal import is_refusal
from nanotron_fast.checkpoints.remote.urls import split, without_password
from nanotron_fast.errors import CheckpointError, ConfigError, MissingPackageError
from nanotron_fast.interruption import ending, held

BLOCK_BYTES = 8 << 20
NUM_AT_A_TIME = 8
NUM_TRIES = 6
FIRST_PAUSE_SECONDS = 0.25
_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 0.5

# What tells the version of a file, the most telling first. A store gives one or the other.
_TAGS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "blob_id", "sha256")
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")
# Another try would change nothing about these.
_FINAL = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(NotImplementedError, ImportError, TypeError, AttributeError),
)
_Result = TypeVar("_Result")


class Version(NamedTuple):
    """What a store says of a file: bytes, and by any of several keys which version it is."""

    size_bytes: int
    marks: dict[str, str]

    @property
    def digest(self) -> int:
        """The same number for the same version, of 61 bits."""
        key = next((key for key in (*_TAGS, *_TIMES) if key in self.marks), "")
        text = f"{self.size_bytes} {key} {self.marks.get(key)}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 3

    @property
    def seconds(self) -> float | None:
        """When it was written, in seconds since 1970 by the store's clock; None where it is mum."""
        for key in _TIMES:
            text = self.marks.get(key)
            if text is None:
                continue
            try:
                return float(text)
            except ValueError:
                with contextlib.suppress(ValueError):
                    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
        return None

    @property
    def has_tag(self) -> bool:
        """Whether there is more than times, which listings may give less exactly."""
        return any(key in self.marks for key in _TAGS)

    def is_other(self, now: Version) -> bool:
        """Whether the file has changed; by the most telling mark that both have."""
        if self.size_bytes != now.size_bytes:
            return True
        for key in (*_TAGS, *_TIMES):
            if key in self.marks and key in now.marks:
                return self.marks[key] != now.marks[key]
        return False


@dataclass(slots=True)
class Store:
    """A folder in a store. Its files are called by their paths from it.

    Args:
        url: for messages.
    """

    url: str
    _fs: Any
    _root: str
    # Requests that begin with nothing to say which version they want, and would be told another.
    _is_pinned: bool = False

    @classmethod
    def at(cls, url: str) -> Store:
        """Raises MissingPackageError, ConfigError for a URL that cannot be; OSError."""
        protocol, path = split(url)
        shown = without_password(url)
        require_store(url)
        try:
            from fsspec.core import url_to_fs

            fs, root = url_to_fs(f"{protocol}://{path}", **_tries_once(protocol))
        except ImportError as error:
            raise MissingPackageError(
                f"{shown}: it cannot be reached without a package that is not installed: "
                f"pip install {package_for(protocol)} ({reason(error)})"
            ) from error
        except ValueError as error:
            raise ConfigError(f"{shown}: {reason(error)}") from error
        except Exception as error:  # what the file system itself says of a URL that it cannot take
            raise ConfigError(f"{shown}: it cannot be reached: {reason(error)}") from error
        store = cls(shown, fs, root.rstrip("/"))
        if protocol == "hf":
            store._pin()
        return store

    def _pin(self) -> None:
        """Reads one commit of a repository of the Hub, whatever its branch becomes."""

        def commit() -> tuple[Any, str | None]:
            where = self._fs.resolve_path(self._root)
            if not hasattr(where, "repo_id"):  # a bucket, which has no commits
                return where, None
            info = self._fs._api.repo_info(
                where.repo_id, revision=where.revision, repo_type=where.repo_type
            )
            return where, info.sha

        where, sha = self._again("the Hub does not answer", commit)
        if sha is not None:
            kind = "" if where.repo_type == "model" else f"{where.repo_type}s/"
            self._root = f"{kind}{where.repo_id}@{sha}/{where.path_in_repo}".rstrip("/")
            self._is_pinned = True

    def name_of(self, name: str) -> str:
        """What messages call a file."""
        return f"{self.url}/{name}" if name else self.url

    def child(self, name: str) -> Store:
        """A folder in it."""
        return Store(f"{self.url}/{name}", self._fs, f"{self._root}/{name}", self._is_pinned)

    def files(self, *, in_folders: bool = True) -> dict[str, Version]:
        """The files in it, at any depth or at the first alone; none where there is no such folder.

        Raises CheckpointError for names that no folder could have, OSError.
        """

        def listed() -> dict[str, dict[str, Any]]:
            self._fs.invalidate_cache()
            try:
                depth = None if in_folders else 1
                return dict(self._fs.find(self._root, maxdepth=depth, detail=True))
            except (FileNotFoundError, NotADirectoryError):
                return {}

        found: dict[str, Version] = {}
        prefix = self._root.lstrip("/") + "/"
        for path, info in self._again("its files cannot be listed", listed).items():
            if info.get("type") == "directory" or path.endswith("/"):
                continue
            name = path.lstrip("/")
            if not name.startswith(prefix):
                # A file whose path is the root's own is no folder.
                continue
            name = name[len(prefix) :]
            if "\x00" in name or any(part in ("", ".", "..") for part in name.split("/")):
                raise CheckpointError(f"{self.url}: {name!r} in it is not the name of a file")
            found[name] = _version_of(info)
        return found

    def version(self, name: str) -> Version:
        """What a file is now. Raises OSError."""

        def asked() -> Version:
            path = f"{self._root}/{name}"
            self._fs.invalidate_cache(self._fs._parent(path))
            return _version_of(self._fs.info(path))

        return self._again("it cannot be asked for", asked, name)

    def check_unchanged(self, name: str, then: Version) -> None:
        """Raises CheckpointError where a file is no longer what it was; OSError."""
        if self._is_pinned:
            return
        try:
            now = self.version(name)
        except FileNotFoundError:
            raise CheckpointError(
                f"{self.name_of(name)}: it has been removed since the conversion was planned"
            ) from None
        if then.is_other(now):
            raise CheckpointError(
                f"{self.name_of(name)}: it has changed since the conversion was planned: it had "
                f"{then.size_bytes:,} bytes and has {now.size_bytes:,}, or was written anew"
            )

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes `begin` to `end`, without `end`, of a file. Raises OSError."""
        # Of a file system of plain calls every read is one of its own, without reading ahead.
        more = {} if self._fs.async_impl else {"cache_type": "none"}

        def got() -> bytes:
            data = self._fs.cat_file(f"{self._root}/{name}", start=begin, end=end, **more)
            if len(data) != end - begin:
                raise OSError(f"{len(data):,} of {end - begin:,} bytes came")
            return bytes(data)

        return self._again(f"bytes {begin:,} to {end:,} cannot be read", got, name)

    def upload(self, path: Path, name: str) -> Version:
        """Writes a whole file, and returns what it is then. Raises OSError."""
        size = path.stat().st_size

        def put() -> Version:
            # s3fs would hold ten parts of 50 MB in memory.
            more = {"max_concurrency": 2} if "s3" in _protocols(self._fs) else {}
            self._make_folder(name)
            self._fs.put_file(str(path), f"{self._root}/{name}", **more)
            return self._check_size(name, size)

        return self._again("it cannot be written", put, name)

    def write(self, name: str, data: bytes) -> Version:
        """Writes a small file, and returns what it is then. Raises OSError."""

        def put() -> Version:
            self._make_folder(name)
            self._fs.pipe_file(f"{self._root}/{name}", data)
            return self._check_size(name, len(data))

        return self._again("it cannot be written", put, name)

    def _make_folder(self, name: str) -> None:
        # Where folders are none, this does nothing.
        if not _protocols(self._fs) & {"s3", "s3a", "gs", "gcs", "hf"}:
            self._fs.makedirs(self._fs._parent(f"{self._root}/{name}"), exist_ok=True)

    def _check_size(self, name: str, size: int) -> Version:
        path = f"{self._root}/{name}"
        self._fs.invalidate_cache(self._fs._parent(path))
        found = _version_of(self._fs.info(path))
        if found.size_bytes != size:
            raise OSError(f"{size:,} bytes were sent, and {found.size_bytes:,} are there")
        return found

    def remove(self, name: str) -> None:
        """Removes a file, or nothing. Raises OSError."""

        def removed() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(f"{self._root}/{name}")

        self._again("it cannot be removed", removed, name)

    def _again(self, what: str, call: Callable[[], _Result], name: str = "") -> _Result:
        """Calls until it works. Raises OSError, which names the file and says what went wrong."""
        for number in range(1, NUM_TRIES + 1):
            try:
                return call()
            except _FINAL as error:
                if isinstance(error, OSError):
                    raise type(error)(
                        error.errno or errno.EIO,
                        f"{what}: {reason(error)}",
                        self.name_of(name),
                    ) from error
                last: Exception = error
                break
            except Exception as error:  # clients of stores have errors of many kinds
                last = error
                if is_refusal(error):
                    raise PermissionError(
                        errno.EACCES,
                        f"{what}: a key is missing or not accepted: {reason(error)}",
                        self.name_of(name),
                    ) from error
                if type(error).__name__ == "OfflineModeIsEnabled":  # nothing was asked
                    break
            if number < NUM_TRIES:
                import random

                pause = FIRST_PAUSE_SECONDS * 2 ** (number - 1)
                time.sleep(pause * random.uniform(0.75, 1.25))
        tries = "" if number == 1 else f" in {number} tries"
        raise OSError(errno.EIO, f"{what}{tries}: {reason(last)}", self.name_of(name)) from last


def _tries_once(protocol: str) -> dict[str, Any]:
    """Options of a client that would try again by itself, within each of our tries."""
    if protocol not in ("s3", "s3a"):
        return {}
    from fsspec.config import conf

    given = conf.get(protocol, {}).get("config_kwargs", {})
    return {"config_kwargs": {"retries": {"total_max_attempts": 1}, **given}}


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def _version_of(info: dict[str, Any]) -> Version:
    marks = {
        key: str(value.timestamp() if isinstance(value, datetime) else value)
        for key in (*_TAGS, *_TIMES)
        if (value := info.get(key)) not in (None, "")
    }
    lfs = info.get("lfs")
    if isinstance(lfs, dict) and lfs.get("sha256"):
        marks["sha256"] = str(lfs["sha256"])
    return Version(int(info.get("size") or 0), marks)


def at_once(
    calls: Iterable[Callable[[], int]], on_progress: Callable[[int], None] | None = None
) -> None:
    """Runs calls on `NUM_AT_A_TIME` threads; each returns the bytes that it has moved.

    `on_progress` is called on this thread with the bytes of all that are done. The first error
    stops the rest and is raised here once all requests have ended. A signal waits for them half a
    second at most: they end with the process then.
    """
    waiting: queue.SimpleQueue[Callable[[], int]] = queue.SimpleQueue()
    num_calls = 0
    for call in calls:
        waiting.put(call)
        num_calls += 1
    finished: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                call = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                finished.put(call())
            except BaseException as error:  # handed to the caller below
                finished.put(error)
                return

    threads = [
        threading.Thread(target=work, name="nanotron_fast-store", daemon=True)
        for _ in range(min(NUM_AT_A_TIME, num_calls))
    ]
    for thread in threads:
        thread.start()
    num_bytes = num_done = 0
    try:
        while num_done < num_calls:
            result: int | BaseException | None = None
            with held(), contextlib.suppress(queue.Empty):  # a signal is answered at the end of it
                result = finished.get(timeout=_POLL_SECONDS)
            if result is None:
                continue
            if isinstance(result, BaseException):
                raise result
            num_done += 1
            num_bytes += result
            if on_progress is not None:
                on_progress(num_bytes)
    except BaseException as error:
        stop.set()
        until = time.monotonic() + _PATIENCE_SECONDS
        with ending():
            for thread in threads:
                is_error = isinstance(error, Exception)
                thread.join(None if is_error else max(0.0, until - time.monotonic()))
        raise
