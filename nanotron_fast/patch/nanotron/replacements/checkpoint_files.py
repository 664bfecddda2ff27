"""Which file of a Nanotron checkpoint holds which of this rank's parameters, as Nanotron names it.

Paths and what files say of themselves come from the Nanotron that is running: main splits experts
over ranks of their own, the released 0.4 does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.nanotron.checkpoint import WEIGHTS
from nanotron_fast.formats.nanotron.slices import check_keys
from nanotron_fast.formats.safetensors import Header


class Unserved(Exception):
    """The call is left to Nanotron itself. The message says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of this rank, and the file that holds it at this topology.

    Attributes:
        name: the tensor's name in the state dict.
        tensor: the tensor itself.
        parameter: the NanotronParameter that it belongs to.
        stored_name: the name that its file goes by; tied parameters share one.
        owner: the rank that writes the file.
        sharded: Nanotron's ShardedInfo; None where every rank has the whole tensor.
        path: the file.
    """

    name: str
    tensor: Tensor
    parameter: Any
    stored_name: str
    owner: int
    sharded: Any
    path: Path

    def other_shards(self) -> list[Path]:
        """The shards that another topology has left in its folder, in the folder's own order."""
        leaf = self.stored_name.rpartition(".")[2]
        return list(self.path.parent.glob(f"model_{leaf}*.safetensors"))


def places(
    model: torch.nn.Module, context: Any, root: Path, tensors: Mapping[str, Tensor]
) -> Iterator[Place]:
    """The place of each tensor of a state dict, in its order.

    Raises NotImplementedError, as Nanotron does, for a tensor that is not one of its parameters.
    """
    from nanotron.parallel.parameters import NanotronParameter

    prefixes = {id(module): f"{name}." for name, module in model.named_modules()}
    prefixes[id(model)] = ""
    rank = dist.get_rank()
    for name, tensor in tensors.items():
        try:
            parameter = model.get_parameter(name)
        except AttributeError:  # a buffer
            parameter = None
        if not isinstance(parameter, NanotronParameter):
            raise NotImplementedError(f"{name}: it is not a NanotronParameter")
        stored_name, owner = name, rank
        if parameter.is_tied:
            tied = parameter.get_tied_info()
            stored_name = tied.get_full_name_from_module_id_to_prefix(prefixes)
            owner = min(tied.global_ranks)
        sharded = parameter.get_sharded_info() if parameter.is_sharded else None
        path = _path(stored_name, owner, sharded, context, root / WEIGHTS)
        yield Place(name, tensor, parameter, stored_name, owner, sharded, path)


def _path(name: str, owner: int, sharded: Any, context: Any, folder: Path) -> Path:
    from nanotron.serialize import utils

    if hasattr(utils, "get_exp_tp_pp_rank_and_size_from"):
        ranks = sharded and utils.get_exp_tp_pp_rank_and_size_from(owner, context)
        is_expert = sharded is not None and sharded.is_expert_sharded(context)
        words = utils.get_path(name, utils.ObjectType.MODEL, ranks, is_expert)
    else:
        ranks = sharded and utils.get_tp_and_pp_rank_and_size_from(owner, context)
        words = utils.get_path(name, utils.ObjectType.MODEL, ranks)
    return folder.joinpath(*words)


def writes(place: Place, context: Any) -> bool:
    """Whether this rank writes a tensor, among those whose data-parallel rank is 0."""
    if hasattr(context, "ep_pg") and dist.get_rank(context.ep_pg) and "experts" not in place.name:
        return False
    return place.owner == dist.get_rank()


def is_replica(context: Any) -> bool:
    """Whether another data-parallel rank, or context-parallel in main, writes all this one has."""
    group = context.dp_cp_pg if hasattr(context, "dp_cp_pg") else context.dp_pg
    return dist.get_rank(group) != 0


def metadata_to_write(place: Place) -> dict[str, str]:
    """What a file's header says of its shard; nothing for a whole tensor."""
    if place.sharded is None:
        return {}
    from nanotron.constants import CHECKPOINT_VERSION
    from nanotron.serialize.metadata import TensorMetadata

    metadata: dict[str, str] = TensorMetadata(
        version=CHECKPOINT_VERSION,
        local_global_slices_pairs=place.sharded.local_global_slices_pairs,
        unsharded_shape=place.sharded.unsharded_shape,
    ).to_str_dict()
    return metadata


def read_metadata(header: Header) -> tuple[tuple[str, str], Any]:
    """The pipeline and tensor rank that a shard's file is called after, and its TensorMetadata.

    Raises CheckpointError where the file lacks them, or was written by a Nanotron that is newer.
    """
    import dacite
    from nanotron.constants import CHECKPOINT_VERSION
    from nanotron.serialize.metadata import TensorMetadata
    from nanotron.serialize.utils import extract_tp_pp_rank_from_shard_path

    path = header.path
    check_keys(path, header.metadata)
    try:
        metadata = TensorMetadata.from_str_dict(header.metadata)
    except (dacite.DaciteError, ValueError) as error:
        raise CheckpointError(f"{path}: its __metadata__ makes no sense: {error}") from error
    if metadata.version > CHECKPOINT_VERSION:
        raise CheckpointError(
            f"{path}: Unsupported checkpoint version {metadata.version}; this Nanotron reads those "
            f"up to {CHECKPOINT_VERSION}"
        )
    if "_tp-rank-" not in path.name:
        raise CheckpointError(f"{path}: the name of a shard's file says its ranks; this one not")
    return extract_tp_pp_rank_from_shard_path(path), metadata
