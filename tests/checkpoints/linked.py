"""Forked processes that share a conversion, over pipes: what torchrun's do over gloo, but at once.

A kill takes milliseconds here, where importing torch and meeting over TCP takes seconds.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from nanotron_fast.checkpoints.processes import PeerFailed, PeerGone, Processes

_Value = TypeVar("_Value")
Pair = tuple[socket.socket, socket.socket]


class Linked(Processes):
    """One of several processes, each of which is linked to the first.

    Args:
        rank: of this one.
        pairs: made before the processes were forked, one for each but the first.
    """

    def __init__(self, rank: int, pairs: Sequence[Pair]) -> None:
        self.rank = rank
        self.world_size = 1 + len(pairs)
        self._links: list[socket.socket] = []
        for other, (hub, end) in enumerate(pairs, start=1):
            mine, others = (hub, end) if rank == 0 else (end, hub)
            others.close()
            if rank in (0, other):
                self._links.append(mine)
            else:
                mine.close()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
        try:
            reasons = self.gather(None if failure is None else str(failure))
        except PeerGone as gone:
            raise (failure or gone) from None
        if failure is not None:
            raise failure
        for rank, reason in enumerate(reasons):
            if reason is not None:
                raise PeerFailed(f"process {rank} failed: {reason}")

    def gather(self, value: _Value) -> list[_Value]:
        try:
            if self.rank == 0:
                values = [value, *map(_receive, self._links)]
                for link in self._links:
                    _send(link, values)
                return values
            _send(self._links[0], value)
            values = _receive(self._links[0])
        except (OSError, EOFError) as error:
            self._cut()
            raise PeerGone(f"another process is gone: {error}") from None
        except BaseException:  # a signal came: what is half sent can mean nothing any more
            self._cut()
            raise
        return values

    def _cut(self) -> None:
        for link in self._links:
            link.close()


def pairs_for(world_size: int) -> list[Pair]:
    """Links for so many processes."""
    return [socket.socketpair() for _ in range(world_size - 1)]


def _send(link: socket.socket, value: object) -> None:
    data = pickle.dumps(value)
    link.sendall(struct.pack("<Q", len(data)) + data)


def _receive(link: socket.socket) -> Any:
    (size,) = struct.unpack("<Q", _exactly(link, 8))
    return pickle.loads(_exactly(link, size))


def _exactly(link: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = link.recv(size - len(data))
        if not more:
            raise EOFError("its end of a link is closed")
        data += more
    return data
