"""Runs a module as several ranks of one gloo group, and inside a rank helps it to check itself."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from nanotron_fast.parallel import chunks
from tests import forks

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 420


def run_ranks(module: str, size: int, *words: str) -> None:
    """Runs `python -m module` as `size` ranks; fails with what the first failing one printed."""
    with tempfile.TemporaryDirectory() as folder:
        common = {"WORLD_SIZE": str(size), "RANKS_STORE": f"{folder}/store", "OMP_NUM_THREADS": "1"}
        environments = [{**common, "RANK": str(rank)} for rank in range(size)]
        results = forks.run(["-m", module, *words], environments, Path(folder), TIMEOUT_SECONDS)
    failed = [i for i, result in enumerate(results) if result.code != 0]
    outputs = [result.out + result.err for result in results]
    # The rank that raised says more than those that lost it.
    failed.sort(
        key=lambda rank: (
            "AssertionError: case" not in outputs[rank],
            "Connection closed by peer" in outputs[rank],
        )
    )
    assert not failed, f"rank {failed[0]} of {size}:\n{outputs[failed[0]]}"
    assert all("cases passed" in output for output in outputs), outputs[0]


def join() -> dist.ProcessGroup:
    """The group of the ranks that `run_ranks` started."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(os.environ["RANKS_STORE"], size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    return dist.group.WORLD


def run_cases(cases: Iterable[tuple[str, Callable[[], None]]]) -> None:
    """Runs each case on every rank, and says how many passed."""
    count = 0
    for name, case in cases:
        torch.manual_seed(0)  # the same tensors on every rank
        try:
            case()
        except Exception as error:
            raise AssertionError(f"case {name}") from error
        count += 1
    assert count
    print(f"{count} cases passed", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    # Not through the interpreter's own end: gloo's threads may outlive their group, and abort it.
    os._exit(0)


def with_chunks(case: Callable[[], None], *, min_product_rows: int = 1) -> None:
    """The same case with its communication cut into chunks, whatever its size.

    With more rows to a product than there are, own rows are multiplied together with the others'.
    """
    names = ("MIN_ROWS", "MIN_PRODUCT_ROWS", "TILE_ROWS")
    kept = [getattr(chunks, name) for name in names]
    try:
        for name, value in zip(names, (1, min_product_rows, 1), strict=True):
            setattr(chunks, name, value)
        case()
    finally:
        for name, value in zip(names, kept, strict=True):
            setattr(chunks, name, value)


def shard(tensor: Tensor, dim: int, chunks: list[int] | None = None) -> Tensor:
    """This rank's part, inside each of the packed chunks along a dimension."""
    rank, size = dist.get_rank(), dist.get_world_size()
    sections = tensor.split(chunks or [tensor.shape[dim]], dim)
    return torch.cat([section.chunk(size, dim)[rank] for section in sections], dim).contiguous()


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def check(ours: Tensor, expected: Tensor, what: str, tolerance: float = 1e-10) -> None:
    """Close to fp64 round-off, or to a tolerance relative to the largest value."""
    assert ours.shape == expected.shape, (what, ours.shape, expected.shape)
    error = (ours.double() - expected.double()).abs().max().item() if ours.numel() else 0.0
    scale = expected.abs().max().item() if ours.numel() else 1.0
    assert error <= tolerance * max(scale, 1e-30), f"{what}: error {error} of {scale}"
