"""Batches made ready by a thread while the step before them runs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Batch = TypeVar("Batch")


def ahead(batch: Callable[[int], Batch], steps: Iterable[int]) -> Generator[Batch, None, None]:
    """The batches of some steps, of which the next is made while one is used.

    An error comes with the step that it belongs to. Closing the iterator waits for the batch that
    is being made.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        waiting: Future[Batch] | None = None
        try:
            for step in steps:
                following = pool.submit(batch, step)
                if waiting is not None:
                    yield waiting.result()
                waiting = following
            if waiting is not None:
                yield waiting.result()
        finally:
            pool.shutdown(cancel_futures=True)
