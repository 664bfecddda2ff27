"""One process, or the processes that torchrun started, working on one conversion."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from nanotron_fast.errors import ConfigError, NanotronFastError


class PeerFailed(NanotronFastError):
    """Another process failed, and has said why."""


class Processes:
    """The only process there is."""

    rank = 0
    world_size = 1

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A part of the work that all processes finish before any goes on.

        An error in one of them becomes PeerFailed in the others.
        """
        yield

    def close(self) -> None:
        """Ends the connection between the processes."""


class TorchProcesses(Processes):
    """Those of torchrun, over gloo. They see one file system."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self._dist: Any = dist
        self._is_ours = not dist.is_initialized()
        if self._is_ours:
            dist.init_process_group("gloo")
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
        messages: list[str | None] = [None] * self.world_size
        try:
            self._dist.all_gather_object(messages, _reason(failure))
        except RuntimeError as error:  # a process that is gone says nothing
            raise (failure or PeerFailed(f"another process is gone: {error}")) from None
        if failure is not None:
            raise failure
        for rank, message in enumerate(messages):
            if message is not None:
                raise PeerFailed(f"process {rank} failed: {message}")

    def close(self) -> None:
        if self._is_ours:
            self._dist.destroy_process_group()


def _reason(failure: BaseException | None) -> str | None:
    return None if failure is None else str(failure) or type(failure).__name__


def connect() -> Processes:
    """The processes that the environment speaks of; torch is imported for more than one alone.

    Raises ConfigError.
    """
    world_size = os.environ.get("WORLD_SIZE") or "1"
    if not world_size.isdecimal():
        raise ConfigError(f"WORLD_SIZE is {world_size!r} in the environment, and not a number")
    if int(world_size) <= 1:
        return Processes()
    try:
        return TorchProcesses()
    except (ImportError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"WORLD_SIZE is {world_size} in the environment, and the processes cannot be "
            f"connected: {error}. Start them with torchrun, or unset WORLD_SIZE"
        ) from error
