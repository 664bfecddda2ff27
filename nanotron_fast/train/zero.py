"""ZeRO-1: which elements of a parameter each data-parallel rank keeps the optimizer's states of.

The runs are Nanotron's (`formats/nanotron/optimizer.py`). Where all of them are equally long, a
reduce-scatter and an all-gather work on the parameter as it lies. Others are rare: they are summed
whole, and gathered through a buffer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nanotron_fast.formats.nanotron.optimizer import Run, runs_of
from nanotron_fast.kernels.runtime.collectives import Group, Ranks, resolve
from nanotron_fast.parallel.communication import (
    start_all_gather,
    start_all_reduce,
    start_reduce_scatters,
)

# Collectives under way: more of them would only hold more memory.
_NUM_UNDER_WAY = 8


def start_sums_of_runs(tensors: Sequence[Tensor], group: Group) -> Callable[[], None]:
    """Starts to sum tensors over a group, so that each rank has the sums of its run.

    The rest of them is spoilt. All whose runs are equally long go together, as one collective.

    Args:
        tensors: contiguous, the same on every rank but for their values.

    Returns what waits until the sums are there.
    """
    ranks = resolve(group)
    flat = [tensor.view(-1) for tensor in tensors]
    even = [tensor for tensor in flat if tensor.numel() % ranks.size == 0]
    scattering = start_reduce_scatters(even, ranks)
    summing = [start_all_reduce(tensor, ranks) for tensor in flat if tensor.numel() % ranks.size]

    def finish() -> None:
        for tensor, own in zip(even, scattering.wait(), strict=True):
            start = ranks.rank * own.numel()
            tensor[start : start + own.numel()].copy_(own)
        for pending in summing:
            pending.wait()

    return finish


def gather_runs(tensors: Sequence[Tensor], group: Group) -> None:
    """Makes tensors whole of which each rank has its run. They are contiguous."""
    ranks = resolve(group)
    under_way: deque[Callable[[], None]] = deque()
    for tensor in tensors:
        flat = tensor.view(-1)
        under_way.append(_start_gather(flat, runs_of(flat.numel(), ranks.size), ranks))
        if len(under_way) == _NUM_UNDER_WAY:
            under_way.popleft()()
    while under_way:
        under_way.popleft()()


def gathered(own: Tensor, runs: Sequence[Run], group: Group) -> Tensor:
    """A flattened tensor from the runs that the ranks of a group have of it.

    Args:
        own: this rank's run, flat.
        runs: of all ranks, one after another; some may be shorter than others, or empty.
    """
    ranks = resolve(group)
    whole = own.new_empty(runs[-1][1])
    start, end = runs[ranks.rank]
    whole[start:end].copy_(own)
    _start_gather(whole, runs, ranks)()
    return whole


def _start_gather(flat: Tensor, runs: Sequence[Run], ranks: Ranks) -> Callable[[], None]:
    """The first run is the longest."""
    start, end = runs[ranks.rank]
    longest = runs[0][1]
    own = flat[start:end]
    if end - start < longest:
        own = torch.cat([own, own.new_zeros(longest - (end - start))])
    gathering = start_all_gather(own, ranks)

    def finish() -> None:
        gathered = gathering.wait().view(ranks.size, longest)
        for rank, (first, last) in enumerate(runs):
            if rank != ranks.rank:
                flat[first:last].copy_(gathered[rank, : last - first])

    return finish


def sum_over(tensor: Tensor, group: Group) -> None:
    """Sums a contiguous tensor over a group, in place."""
    if group is not None:
        dist.all_reduce(tensor, group=resolve_group(group))


def resolve_group(group: Group) -> dist.ProcessGroup:
    """The process group that a group stands for, which is not None."""
    return dist.distributed_c10d._resolve_process_group(resolve(group).name)
