"""Processes that make tokens, each at the other end of two pipes.

They are started afresh, for this process may hold threads, sockets and a GPU that none may inherit;
and not by multiprocessing, which would run the user's script again in each of them. One that finds
its pipe closed ends, so none outlives its parent.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, islice
from typing import Any, BinaryIO

from nanotron_fast.errors import DataError
from nanotron_fast.interruption import ending
from nanotron_fast.train.data.encode import Encoded, Recipe
from nanotron_fast.train.data.text import Block

_SIZE_BYTES = 8


def encode(blocks: Iterable[Block], recipe: Recipe, workers: int) -> Generator[Encoded, None, None]:
    """The tokens of blocks, in their order, made here or by two processes and more.

    At most two blocks a process are in memory. Raises DataError, of the first block that has one.
    """
    rest = iter(blocks)
    first = list(islice(rest, 2))
    every = chain(first, rest)
    # A single block is done before a process has begun.
    if workers > 1 and len(first) > 1:
        yield from _in_processes(every, recipe, workers)
        return
    encoder = recipe.build()
    for block in every:
        yield encoder(block)


def _in_processes(
    blocks: Iterable[Block], recipe: Recipe, workers: int
) -> Generator[Encoded, None, None]:
    helpers = _Helpers(recipe)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokens")
    try:
        waiting: deque[Future[Encoded]] = deque()
        for block in blocks:
            waiting.append(pool.submit(helpers.work, block))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        with ending():
            helpers.end()
            pool.shutdown(cancel_futures=True)


class _Helpers:
    """A process for each thread of a pool."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = pickle.dumps(recipe)
        self._mine = threading.local()
        self._started: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._is_over = False

    def work(self, block: Block) -> Encoded:
        """What this thread's process makes of a block. Raises DataError."""
        process = getattr(self._mine, "process", None) or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send(process.stdin, pickle.dumps(block))
            answer = _receive(process.stdout)
        except (EOFError, OSError) as error:
            code = process.poll()
            raise DataError(
                f"a process that makes tokens ended before its time (exit code {code}): was there "
                "enough memory? Fewer processes need less of it"
            ) from error
        found = pickle.loads(answer)
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, Encoded)
        return found

    def _start(self) -> subprocess.Popen[bytes]:
        code = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            "from nanotron_fast.train.data.worker import serve; serve()"
        )
        with self._lock:
            if self._is_over:
                raise EOFError
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # A tokenizer's own threads would be too many beside the processes.
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )
            self._started.append(process)
        self._mine.process = process
        assert process.stdin is not None
        _send(process.stdin, self._recipe)
        return process

    def end(self) -> None:
        """Ends every process at once: nothing that they still do is wanted."""
        with self._lock:
            self._is_over = True
            started = list(self._started)
        for process in started:
            process.kill()
        for process in started:
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                # What it had not read is not wanted either.
                with suppress(BrokenPipeError):
                    stream.close()


def _send(stream: BinaryIO | Any, data: bytes) -> None:
    stream.write(len(data).to_bytes(_SIZE_BYTES, "little"))
    stream.write(data)
    stream.flush()


def _receive(stream: BinaryIO | Any) -> bytes:
    """Raises EOFError at the end."""
    size = int.from_bytes(_exactly(stream, _SIZE_BYTES), "little")
    return _exactly(stream, size)


def _exactly(stream: BinaryIO | Any, size: int) -> bytes:
    data: bytes = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def serve() -> None:
    """The other end: a recipe, and then block after block until the pipe is closed."""
    # The parent answers for both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    # What a library prints must not come between.
    os.dup2(2, 1)
    blocks = sys.stdin.buffer
    try:
        encoder = pickle.loads(_receive(blocks)).build()
        while True:
            block = pickle.loads(_receive(blocks))
            try:
                found: Encoded | Exception = encoder(block)
            except DataError as error:
                found = error
            _send(answers, pickle.dumps(found))
    except (EOFError, BrokenPipeError):
        return
