"""One process, or the processes that torchrun started, working on one conversion."""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from nanotron_fast.errors import ConfigError, NanotronFastError, puts_in_doubt
from nanotron_fast.extras import require
from nanotron_fast.interruption import Interrupted, wait

_Value = TypeVar("_Value")
_POLL_SECONDS = 0.1
_PATIENCE = datetime.timedelta(days=1)
# How long a process that is interrupted waits for the others to hear of it.
_FAREWELL_SECONDS = 3.0
_has_joined = threading.Event()
_GONE = "is gone, without a word; what started it tells which, and how it ended"
_SILENT = "has not answered for as long as one waits"
# By words of errors of gloo, torch's store and NCCL, what became of the process on the other end.
_LOST = {
    "Connection closed by peer": _GONE,
    "Connection reset by peer": _GONE,
    "Broken pipe": _GONE,
    "connectFullMesh failed": _GONE,
    "Connection was likely closed": _GONE,
    "remote process exited": _GONE,
    "Timed out waiting": _SILENT,
    "timeout caused pair closure": _SILENT,
}


class PeerFailed(NanotronFastError):
    """Another process failed, and has said why."""


class PeerGone(PeerFailed):
    """Another process has ended, and could say nothing."""


def peer_gone(error: RuntimeError) -> PeerGone | None:
    """What an error of a collective, or its cause, says of the process on the other end.

    None where it says nothing of one.
    """
    cause: BaseException | None = error
    while isinstance(cause, RuntimeError):
        for words, told in _LOST.items():
            if words in str(cause):
                return PeerGone(f"another process {told}")
        cause = cause.__cause__
    return None


class Processes:
    """The only process there is.

    `is_in_doubt`: an error of another one, in the last step, puts in doubt what was written.
    """

    rank = 0
    world_size = 1
    is_in_doubt = False

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A part of the work that all processes finish before any goes on.

        An error in one of them becomes PeerFailed in the others.
        """
        yield

    def gather(self, value: _Value) -> list[_Value]:
        """What all processes have here, by their ranks. Raises PeerGone."""
        return [value]

    def close(self) -> None:
        """Ends the connection between the processes."""


class TorchProcesses(Processes):
    """Those of torchrun, over gloo. They see one file system.

    Args:
        group: a process group of all of them, for a thread that works beside others; by default one
            that waits for a day, where torch's own wait for half an hour: while one of them makes
            tokens or fetches a model, or has slower disks. One that dies is noticed at once.
    """

    def __init__(self, group: Any = None) -> None:
        import torch.distributed as dist

        self._dist: Any = dist
        self._is_ours = not dist.is_initialized()
        self._is_abandoned = False
        if self._is_ours:
            join("gloo")
        self._group = group or _patient_group()
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
        said: list[tuple[str, bool] | None] = [None] * self.world_size
        is_interrupted = isinstance(failure, Interrupted | KeyboardInterrupt)
        try:
            _call_patiently(
                lambda: self._dist.all_gather_object(said, _said_of(failure), self._group),
                _FAREWELL_SECONDS if is_interrupted else None,
            )
        except RuntimeError as error:  # a process that is gone says nothing
            raise (failure or _gone(error)) from error
        except BaseException as error:
            # The others have not come; a connection in use cannot be closed in order.
            self._is_abandoned = True
            raise (failure or error) from None
        self.is_in_doubt = any(each is not None and each[1] for each in said)
        # What all of them find wrong is said once.
        if failure is not None and said.index(said[self.rank]) == self.rank:
            raise failure
        for rank, each in enumerate(said):
            if each is not None:
                raise PeerFailed(f"process {rank} failed: {each[0]}")

    def gather(self, value: _Value) -> list[_Value]:
        values: list[_Value] = [value] * self.world_size
        try:
            _call_patiently(lambda: self._dist.all_gather_object(values, value, self._group))
        except RuntimeError as error:
            raise _gone(error) from error
        except BaseException:
            self._is_abandoned = True
            raise
        return values

    def close(self) -> None:
        if not self._is_abandoned:
            # A connection that was there stays; what was made for this alone does not.
            self._dist.destroy_process_group(None if self._is_ours else self._group)


def _call_patiently(call: Callable[[], object], limit_seconds: float | None = None) -> None:
    """Calls what waits for other processes, and answers signals while it waits.

    It waits outside Python, where no handler runs: so it does on a thread of its own, which is left
    behind when a signal comes. Raises TimeoutError after the limit.
    """
    errors: list[BaseException] = []
    finished = threading.Event()

    def guarded() -> None:
        try:
            call()
        except BaseException as error:  # handed to the caller below
            errors.append(error)
        finally:
            finished.set()

    threading.Thread(target=guarded, name="nanotron_fast-processes", daemon=True).start()
    waited = 0.0
    while not wait(finished, _POLL_SECONDS):
        waited += _POLL_SECONDS
        if limit_seconds is not None and waited >= limit_seconds:
            raise TimeoutError(f"the other processes have not come in {limit_seconds:g} s")
    if errors:
        raise errors[0]


def _patient_group() -> Any:
    """A group of all processes. Raises PeerGone."""
    import torch.distributed as dist

    made: list[Any] = []
    try:
        _call_patiently(lambda: made.append(dist.new_group(backend="gloo", timeout=_PATIENCE)))
    except RuntimeError as error:
        raise _gone(error) from error
    return made[0]


def _gone(error: RuntimeError) -> PeerGone:
    return peer_gone(error) or PeerGone(f"another process is gone: {error}")


def _said_of(failure: BaseException | None) -> tuple[str, bool] | None:
    """What the others hear of an error: why, and whether it puts in doubt what was written."""
    if failure is None:
        return None
    return str(failure) or type(failure).__name__, puts_in_doubt(failure)


def told_rank() -> int:
    """This process's rank among those that the environment speaks of, which are not connected.

    Raises ConfigError.
    """
    return _told("RANK", "0") if told_size() > 1 else 0


def told_size() -> int:
    """How many processes the environment speaks of. Raises ConfigError."""
    return _told("WORLD_SIZE", "1")


def _told(name: str, default: str) -> int:
    value = os.environ.get(name) or default
    if not value.isdecimal():
        raise ConfigError(f"{name} is {value!r} in the environment, and not a number")
    return int(value)


def join(backend: str) -> None:
    """Connects the processes that the environment speaks of, and answers signals meanwhile.

    Raises ConfigError.
    """
    import torch.distributed as dist

    try:
        _call_patiently(lambda: dist.init_process_group(backend))
    except (ImportError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"WORLD_SIZE is {told_size()} in the environment, and the processes cannot be "
            f"connected: {error}. Start them with torchrun, or unset WORLD_SIZE"
        ) from error
    _has_joined.set()


def is_joined() -> bool:
    """Whether `join` has connected this process, and it still is; what others connect is theirs."""
    if not _has_joined.is_set():
        return False
    import torch.distributed as dist

    return bool(dist.is_initialized())


def connect() -> Processes:
    """The processes that the environment speaks of; torch is imported for more than one alone.

    Raises ConfigError, MissingPackageError.
    """
    size = told_size()
    if size <= 1:
        return Processes()
    require("kernels", f"WORLD_SIZE is {size}, and work shared by processes", ["torch"])
    return TorchProcesses()
