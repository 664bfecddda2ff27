"""Times kernels, not Python: a captured graph is replayed, and its replays are timed on the device.
A graph holds so many calls that its launch is nothing beside them, and replays follow each other
without a pause.

Where a capture is impossible the profiler's sum of kernel times stands in. The calls of a sample
rotate over several sets of inputs, so that what one reads was not left in the cache by the last.
On a CPU, where this only shows that it runs, the clock on the wall is read.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.context import Context

# More than the caches of today's GPUs hold, twice over.
ROTATED_BYTES = 256 << 20
MAX_SETS = 8
_SAMPLES = 30
_SAMPLE_SECONDS = 0.4
# What a replay should take at least: the launch of a graph takes some ten microseconds.
_REPLAY_MS = 1.0
_MOST_CALLS = 256

Work = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    method: str

    def row(self) -> dict[str, Any]:
        times = {name: round(getattr(self, name), 6) for name in ("p20_ms", "p50_ms", "p80_ms")}
        return times | {"method": self.method}


def quantiles(samples: Sequence[float], method: str) -> Times:
    ordered = sorted(samples)
    at = [ordered[min(len(ordered) - 1, int(p * len(ordered)))] for p in (0.2, 0.5, 0.8)]
    return Times(*at, method)


def num_sets(tensors: Sequence[Tensor], context: Context) -> int:
    """How many sets of such inputs it takes to pass the cache."""
    num_bytes = sum(t.numel() * t.element_size() for t in tensors) or 1
    return 2 if context.dry else max(1, min(MAX_SETS, -(-ROTATED_BYTES // num_bytes)))


def num_rounds(round_ms: float, num_calls: int) -> int:
    """How often a graph goes over `num_calls` calls, which together take `round_ms`."""
    wanted = math.ceil(_REPLAY_MS / max(round_ms, 1e-4))
    return max(1, min(wanted, _MOST_CALLS // num_calls))


def num_samples(replay_ms: float) -> int:
    """How many replays are timed: fewer where they take long."""
    return max(8, min(_SAMPLES, int(_SAMPLE_SECONDS * 1e3 / max(replay_ms, 1e-4))))


def _capture(work: Sequence[Work], rounds: int, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """The calls one after the other, so many times. Results of one round at most are alive."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        alive: deque[Any] = deque(maxlen=len(work))
        for _ in range(rounds):
            for call in work:
                alive.append(call())
        alive.clear()
    return graph


def _replay(graph: torch.cuda.CUDAGraph, times: int) -> list[float]:
    """Milliseconds of each replay; all are in the queue before the first is waited for."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    marks[-1].synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(marks)]


def _captured(
    work: Sequence[Work], stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, int, float]:
    """A graph, the calls in it, and about how many milliseconds it takes."""
    for call in (*work, work[0]):
        call()
    stream.synchronize()
    graph = _capture(work, 1, stream)
    took = min(_replay(graph, 4)[1:])
    rounds = num_rounds(took, len(work))
    if rounds > 1:
        graph.reset()
        graph = _capture(work, rounds, stream)
    return graph, rounds * len(work), rounds * took


def _replayed(work: Sequence[Work], stream: torch.cuda.Stream) -> list[float]:
    """Milliseconds of a call in each of many replays. Raises what a capture raises."""
    with torch.cuda.stream(stream):
        graph, num_calls, took = _captured(work, stream)
        samples = _replay(graph, num_samples(took) + 3)[3:]
        graph.reset()
    return [sample / num_calls for sample in samples]


Way = Callable[[], AbstractContextManager[None]]


def beside(
    make: Callable[[], Sequence[Work]], ways: Sequence[Way], context: Context
) -> list[Times]:
    """Times of the same call made in several ways, in turns.

    A way is what a call is inside of where it is captured, or on a CPU where it runs. One that
    cannot be captured is timed by the profiler, alone.
    """
    if context.dry:
        work = make()
        samples: list[list[float]] = [[] for _ in ways]
        for _ in range(2):
            for way, its in zip(ways, samples, strict=True):
                with way():
                    its += _on_the_wall(work)
        return [quantiles(its, "wall") for its in samples]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graphs, found = {}, {}
    with torch.cuda.stream(stream):
        work = make()
        for place, way in enumerate(ways):
            with way():
                try:
                    graphs[place] = _captured(work, stream)
                except Exception as error:  # libraries fail in many ways to be captured
                    found[place] = _by_profiler(work, error)
        turns = num_samples(max((took for _, _, took in graphs.values()), default=0.0))
        replayed: dict[int, list[float]] = {place: [] for place in graphs}
        for _ in range(turns):
            for place, (graph, num_calls, _) in graphs.items():
                # Of two replays in a row the first finds the caches as the other way left them.
                replayed[place].append(_replay(graph, 2)[1] / num_calls)
    found |= {place: quantiles(its, "graph") for place, its in replayed.items()}
    return [found[place] for place in range(len(ways))]


def _profiled(work: Sequence[Work]) -> list[float]:
    """Milliseconds that kernels of a call took, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    samples = []
    for call in work:
        call()
    for call in (*work, *work, *work):
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        samples.append(sum(e.self_device_time_total for e in seen.key_averages()) / 1e3)
    return samples


def _by_profiler(work: Sequence[Work], error: Exception) -> Times:
    """Where a capture has failed with an error."""
    torch.cuda.synchronize()
    reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
    return quantiles(_profiled(work), f"profiler ({reason})")


def _on_the_wall(work: Sequence[Work]) -> list[float]:
    samples = []
    for call in (*work, work[0]):
        begun = time.perf_counter()
        call()
        samples.append((time.perf_counter() - begun) * 1e3)
    return samples


def measure(make: Callable[[], Sequence[Work]], context: Context) -> Times:
    """Times of one call; `make` gives the same call on several sets of inputs.

    It is called where the calls will run: a backward follows the stream of its forward.
    """
    if context.dry:
        return quantiles(_on_the_wall(make()), "wall")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work = make()
    try:
        return quantiles(_replayed(work, stream), "graph")
    except Exception as error:  # libraries fail in many ways to be captured
        return _by_profiler(work, error)
