"""Collectives along dimension 0 that are started, and waited for later.

What runs between the start and the wait overlaps with the communication: on NCCL's own stream, on
gloo's own threads. While torch.compile traces, they are functional collectives, which it may
reorder and fuse itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanotron_fast.errors import TopologyError
from nanotron_fast.kernels.runtime import collectives
from nanotron_fast.kernels.runtime.collectives import Ranks

MODES = ("all_reduce", "reduce_scatter")


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode {mode!r}: choose {' or '.join(MODES)}")


@dataclass
class Pending:
    """A tensor on its way, or here already where nothing is to be done."""

    tensor: Tensor
    work: Any = None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.tensor


@dataclass
class Together:
    """Several tensors' ways, as the work of one `Pending`."""

    pending: Sequence[Pending]

    def wait(self) -> None:
        for each in self.pending:
            each.wait()


@dataclass
class PendingTensors:
    """Tensors that are on their way together."""

    tensors: list[Tensor]
    work: Any = None

    def wait(self) -> list[Tensor]:
        if self.work is not None:
            self.work.wait()
        return self.tensors


def start_all_reduce(tensor: Tensor, ranks: Ranks) -> Pending:
    """The sum over ranks, in place of a tensor that nobody else reads."""
    if ranks.size == 1:
        return Pending(tensor)
    if torch.compiler.is_compiling():
        return Pending(collectives.all_reduce(tensor, ranks))
    return Pending(tensor, dist.all_reduce(tensor, group=_group(ranks), async_op=True))


def start_all_gather(tensor: Tensor, ranks: Ranks, *, out: Tensor | None = None) -> Pending:
    """(rows, ...) -> (size * rows, ...), the ranks' rows one after another.

    Args:
        out: where they go to, contiguous, if that is there already. Not to be traced.
    """
    if ranks.size == 1:
        return Pending(tensor)
    tensor = tensor.contiguous()
    shape = (ranks.size * tensor.shape[0], *tensor.shape[1:])
    if torch.compiler.is_compiling():
        return Pending(collectives.all_gather(tensor, ranks).view(shape))
    # Renamed in torch 2.13.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    out = tensor.new_empty(shape) if out is None else out
    return Pending(out, gather(out, tensor, group=_group(ranks), async_op=True))


def start_reduce_scatter(tensor: Tensor, ranks: Ranks, *, out: Tensor | None = None) -> Pending:
    """(size * rows, ...) -> (rows, ...), summed over ranks.

    Args:
        out: where the sum goes to, contiguous, if that is there already. Not to be traced.

    Raises TopologyError where the rows do not divide.
    """
    if ranks.size == 1:
        return Pending(tensor)
    if tensor.shape[0] % ranks.size:
        raise TopologyError(f"{tensor.shape[0]} rows do not scatter over tp={ranks.size}")
    tensor = tensor.contiguous()
    if torch.compiler.is_compiling():
        return Pending(collectives.reduce_scatter(tensor, ranks))
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    if out is None:
        out = tensor.new_empty((tensor.shape[0] // ranks.size, *tensor.shape[1:]))
    return Pending(out, scatter(out, tensor, group=_group(ranks), async_op=True))


def start_reduce_scatters(tensors: Sequence[Tensor], ranks: Ranks) -> PendingTensors:
    """(size * n,) -> (n,) of each, summed over ranks, in one collective. Not to be traced.

    Args:
        tensors: contiguous, of one dtype.
    """
    if ranks.size == 1 or not tensors:
        return PendingTensors(list(tensors))
    group = _group(ranks)
    # Renamed in torch 2.13.
    scatter = getattr(group, "reduce_scatter_single_coalesced", None) or (
        group.reduce_scatter_tensor_coalesced
    )
    options = dist.ReduceScatterOptions()
    options.asyncOp = True
    outs = [tensor.new_empty(tensor.numel() // ranks.size) for tensor in tensors]
    return PendingTensors(outs, scatter(outs, list(tensors), options))


def start_all_to_all(
    tensor: Tensor, ranks: Ranks, *, sent: Sequence[int], received: Sequence[int]
) -> Pending:
    """Rows for each rank, one rank's after another's, become those that each has for this one.

    Not to be traced.

    Args:
        tensor: (sum of sent, ...).
        sent, received: how many rows go to each rank, and come from it. What a rank sends to
            another is what that one receives from it.
    """
    if ranks.size == 1:
        return Pending(tensor)
    tensor = tensor.contiguous()
    out = tensor.new_empty((sum(received), *tensor.shape[1:]))
    work = dist.all_to_all_single(
        out, tensor, list(received), list(sent), group=_group(ranks), async_op=True
    )
    return Pending(out, work)


def _group(ranks: Ranks) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(ranks.name)
