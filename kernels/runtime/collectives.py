"""Collectives over one group of ranks, on NCCL and gloo, in eager mode and under torch.compile.

A group is a ProcessGroup, a DeviceMesh of one dimension, or None for a rank alone. An operation
turns it into `Ranks` once: a name, a number and a size, which custom operators and autograd
functions can carry. Nothing here is differentiable: each operation says itself what its gradient
does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Group = dist.ProcessGroup | DeviceMesh | None


class Ranks(NamedTuple):
    """A group by its name in torch.distributed, this process's rank in it, and its size."""

    name: str
    rank: int
    size: int


ALONE = Ranks("", 0, 1)


def resolve(group: Group) -> Ranks:
    """Name, rank and size of a group.

    Raises ValueError for a mesh of several dimensions, and for a process that is not in the group.
    """
    if group is None:
        return ALONE
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"a group is a mesh of one dimension, not {group.ndim}: take mesh[name]"
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError("a group is a ProcessGroup that this rank is in, a DeviceMesh, or None")
    return Ranks(group.group_name, group.rank(), group.size())


def _wait(tensor: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(tensor)


def all_reduce(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The sum over all ranks. It may be written over the tensor, which is not to be used again."""
    if ranks.size == 1:
        return tensor
    tensor = tensor.contiguous()
    if torch.compiler.is_compiling():
        return _wait(torch.ops._c10d_functional.all_reduce(tensor, "sum", ranks.name))
    return _wait(torch.ops._c10d_functional.all_reduce_(tensor, "sum", ranks.name))


def sum_in_background(tensor: Tensor, ranks: Ranks) -> Any:
    """Begins to sum a contiguous tensor in place: call `wait()` on the result. Not to be traced."""
    group = dist.distributed_c10d._resolve_process_group(ranks.name)
    return dist.all_reduce(tensor, group=group, async_op=True)


def all_gather(tensor: Tensor, ranks: Ranks) -> Tensor:
    """(...) of each rank -> (ranks, ...)."""
    if ranks.size == 1:
        return tensor.unsqueeze(0)
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(
        tensor.contiguous(), ranks.size, ranks.name
    )
    return _wait(gathered).view(ranks.size, *tensor.shape)


def reduce_scatter(tensor: Tensor, ranks: Ranks) -> Tensor:
    """(ranks * n, ...) of each rank -> this rank's n of their sum."""
    if ranks.size == 1:
        return tensor
    scattered = torch.ops._c10d_functional.reduce_scatter_tensor(
        tensor.contiguous(), "sum", ranks.size, ranks.name
    )
    return _wait(scattered)
