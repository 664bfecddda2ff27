"""DTensors in lists, as FSDP2 and torch's tensor parallelism have parameters and gradients.

What works element by element works on the shards that this rank has of them, which are plain
tensors and may be empty. A norm is summed over the ranks among whom a tensor is split.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanotron_fast.kernels.runtime.backend import constant_in_a_graph
from nanotron_fast.kernels.runtime.collectives import Ranks, resolve

# How a DTensor lies: its mesh, and a placement for each dimension of that.
_Layout = tuple[Any, tuple[Any, ...]]


@constant_in_a_graph
def _dtensor() -> Any:
    """torch's class; no class where nobody has imported it, so that there are none."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())


def are_among(tensors: Sequence[Tensor]) -> bool:
    """Whether some of these are DTensors."""
    dtensor = _dtensor()
    return bool(dtensor) and any(issubclass(kind, dtensor) for kind in set(map(type, tensors)))


def _layout(name: str, label: str, place: int, tensor: Any) -> _Layout | None:
    """How a tensor lies; None for a plain one. Raises ValueError for what is yet to be summed."""
    if not isinstance(tensor, _dtensor()):
        return None
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"{name}: {label}[{place}] has placements {tensor.placements}: it is yet to be summed "
            "over ranks, by redistribute()"
        )
    return tensor.device_mesh, tuple(tensor.placements)


def local(
    name: str, lists: dict[str, list[Tensor]], *, written: Sequence[str]
) -> dict[str, list[Tensor]]:
    """What this rank has of lists that are read side by side: shards in the place of DTensors.

    Args:
        name: of the operation, for errors.
        lists: by their names, as long as each other.
        written: names of those that are to be written. Autograd is told.

    Returns:
        lists of plain tensors: those that were given, where the first has no DTensor.

    Raises:
        ValueError: tensors of one place lie in different ways, or one is yet to be summed.
    """
    (first, leaders), *_ = lists.items()
    if not are_among(leaders):
        return lists
    layouts = [_layout(name, first, place, tensor) for place, tensor in enumerate(leaders)]
    for label, tensors in lists.items():
        # Lengths that differ are told with all else that has to fit.
        for place, (tensor, leader) in enumerate(zip(tensors, layouts, strict=False)):
            layout = _layout(name, label, place, tensor)
            if layout != leader:
                raise ValueError(
                    f"{name}: {label}[{place}] {_words(layout)} "
                    f"where {first}[{place}] {_words(leader)}"
                )
    for label in written:
        torch.autograd.graph.increment_version(lists[label])
    return {label: [_shard(tensor) for tensor in tensors] for label, tensors in lists.items()}


def _words(layout: _Layout | None) -> str:
    return "is a plain tensor" if layout is None else f"has placements {layout[1]} on {layout[0]}"


def _shard(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, _dtensor()) else tensor


def by_ranks(
    name: str, label: str, tensors: list[Tensor]
) -> list[tuple[list[Tensor], list[Ranks]]]:
    """This rank's shards, and the groups over which what they add up to is to be summed.

    Raises ValueError for a tensor that is yet to be summed itself.
    """
    if not are_among(tensors):
        return [(tensors, [])]
    parts: dict[tuple[Any, tuple[int, ...]], list[Tensor]] = {}
    for place, tensor in enumerate(tensors):
        mesh, placements = _layout(name, label, place, tensor) or (None, ())
        split = tuple(dim for dim, each in enumerate(placements) if not each.is_replicate())
        parts.setdefault((mesh, split), []).append(_shard(tensor))
    return [
        (shards, [resolve(mesh.get_group(dim)) for dim in split])
        for (mesh, split), shards in parts.items()
    ]


def whole(tensor: Any) -> Tensor:
    """A DTensor's value on every rank; other tensors as they are."""
    return tensor.full_tensor() if isinstance(tensor, _dtensor()) else tensor
