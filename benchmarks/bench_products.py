"""Tensor-parallel products beside communication: how many there are, what they copy, and gloo.

    python benchmarks/bench_products.py [--rounds 15] [--counts-only]

Counts are of a forward and a backward in bf16 at tp=8, for ranks at the edge and between: products,
and the bytes that copies write. They are what a GPU would launch. Times are of two ranks over gloo
on this CPU, in chunks and not, in turns; both have the same result, or nothing is timed. gloo's
threads and the products share the cores, so they say little of a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from counting import Counts
from torch.testing._internal.distributed.fake_pg import FakeStore

from nanotron_fast.parallel import (
    chunks,
    column_linear,
    row_linear,
    symmetric,
    tensor_parallel_mlp,
)

TP = 8
HIDDEN, FEATURES = 1024, 256


def calls(total: int, size: int, dtype: torch.dtype, group) -> dict[str, Callable[[], object]]:
    """A forward and a backward each, in mode "reduce_scatter"; what they give is all gradients."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype).div_(8).requires_grad_()

    options = {"group": group, "mode": "reduce_scatter"}
    x, h = leaf(total // size, HIDDEN), leaf(total, FEATURES)
    column, gate_up, row = (
        leaf(FEATURES, HIDDEN),
        leaf(2 * FEATURES, HIDDEN),
        leaf(HIDDEN, FEATURES),
    )

    def step(function: Callable[..., torch.Tensor], *leaves: torch.Tensor) -> list[torch.Tensor]:
        y = function(*leaves, **options)
        return [y.detach(), *torch.autograd.grad(y, leaves, y.detach())]

    return {
        "column_linear": partial(step, column_linear, x, column),
        "row_linear": partial(step, row_linear, h, row),
        "mlp": partial(step, tensor_parallel_mlp, x, gate_up, row),
    }


def count(total: int, rank: int) -> None:
    """Over collectives that end at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=TP)
    for name, call in calls(total, TP, torch.bfloat16, dist.group.WORLD).items():
        with Counts() as counts, mock.patch.object(symmetric, "is_used", return_value=False):
            call()
        found = {
            "operation": name,
            "rows": total,
            "tp": TP,
            "rank": rank,
            "products": len(counts.rows),
            "copied_bytes": sum(counts.copied),
        }
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def time_rank(rank: int, size: int, store: str, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    torch.manual_seed(rank)
    total = 4096
    for name, call in calls(total, size, torch.float32, dist.group.WORLD).items():
        whole = mock.patch.object(chunks, "MIN_ROWS", total + 1)
        with whole:
            expected = call()
        for ours, theirs in zip(call(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        samples: dict[str, list[float]] = {"whole": [], "chunks": []}
        for _ in range(rounds):
            for way, seconds in samples.items():
                with whole if way == "whole" else mock.patch.object(chunks, "MIN_ROWS", total):
                    dist.barrier()
                    start = time.perf_counter()
                    call()
                    seconds.append(time.perf_counter() - start)
        medians = {way: statistics.median(seconds) for way, seconds in samples.items()}
        if rank == 0:
            found = {"operation": name, "rows": total, "ranks": size, "backend": "gloo"}
            milliseconds = {f"{way}_ms": round(1e3 * each, 1) for way, each in medians.items()}
            ratio = round(medians["chunks"] / medians["whole"], 2)
            print(json.dumps({**found, **milliseconds, "ratio": ratio}), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--counts-only", action="store_true")
    options = parser.parse_args()
    for total in (2048, 4096, 16384):
        for rank in (0, 3):
            count(total, rank)
    if not options.counts_only:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (2, f"{folder}/store", options.rounds)
            torch.multiprocessing.spawn(time_rank, args=arguments, nprocs=2)


if __name__ == "__main__":
    main()
