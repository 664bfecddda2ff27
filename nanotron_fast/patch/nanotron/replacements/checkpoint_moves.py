"""The moves that fill this rank's tensors from the files that Nanotron has written.

What is Nanotron's or torch's stays here: what a file holds, what a tensor is, and which calls are
left to Nanotron itself. Shards are joined by `checkpoints.plan.shards`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nanotron_fast.checkpoints.load import DTYPES
from nanotron_fast.checkpoints.plan.shards import Share, plan_shards
from nanotron_fast.errors import CheckpointError, UnmovableError
from nanotron_fast.formats.nanotron.checkpoint import TENSOR
from nanotron_fast.formats.nanotron.slices import SlicesPair
from nanotron_fast.formats.safetensors import Header, TensorInfo
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.move import Move
from nanotron_fast.patch.nanotron.replacements.checkpoint_files import Unserved


def stored_tensor(header: Header) -> TensorInfo:
    """The one tensor of a file. Raises CheckpointError where it is not there, Unserved for more."""
    if TENSOR not in header.tensors:
        names = ", ".join(header.tensors) or "nothing"
        raise CheckpointError(f"{header.path}: it holds {names}; a Nanotron file holds {TENSOR!r}")
    if len(header.tensors) > 1:  # 0.4 writes what weight decay leaves out beside Mamba's tensors
        raise Unserved(f"{header.path} holds {', '.join(header.tensors)}")
    return header.tensors[TENSOR]


def whole_move(name: str, tensor: Tensor, index: int, header: Header, file: int) -> list[Move]:
    """The one move from a file that holds just what a tensor wants; none for an empty tensor.

    Raises CheckpointError where the shapes differ, Unserved where the dtypes are not cast.
    """
    info = stored_tensor(header)
    if info.shape != tuple(tensor.shape):
        raise CheckpointError(
            f"{header.path}: its shape is {list(info.shape)}, and {name} is {list(tensor.shape)}"
        )
    stored, wanted = _dtypes(name, tensor, header)
    move = Move(
        source=file,
        source_offset=info.begin_bytes,
        destination=index,
        destination_offset=0,
        sizes=(info.num_elements, 1, 1),
        source_strides=(1, 1, 1),
        destination_strides=(1, 1, 1),
        source_dtype=stored,
        destination_dtype=wanted,
    )
    return [move] if info.num_elements else []


def shard_moves(
    name: str,
    tensor: Tensor,
    index: int,
    pairs: Sequence[Any],
    shards: Mapping[Path, tuple[int, Header, Any]],
) -> list[Move]:
    """The moves that fill this rank's shard from the shards that another topology has left.

    Args:
        name: the name of the tensor that is filled.
        tensor: the tensor itself, contiguous.
        index: the tensor's number among the destinations of the moves.
        pairs: Nanotron's SlicesPairs of the tensor.
        shards: for each file its number among the sources, its header and its TensorMetadata.

    Raises:
        CheckpointError: the shards contradict each other or the tensor, or some are missing.
        Unserved: they overlap, or are cut in a way that moves cannot say.
    """
    first, (_, _, metadata_of_first) = next(iter(shards.items()))
    wanted = Share(
        name=name,
        file=index,
        offset_bytes=0,
        dtype=DTYPES[tensor.dtype],
        shape=tuple(tensor.shape),
        pairs=_pairs(pairs),
        whole_shape=tuple(metadata_of_first.unsharded_shape),
    )
    stored: list[Share] = []
    for path, (file, header, metadata) in shards.items():
        info = stored_tensor(header)
        dtype, _ = _dtypes(name, tensor, header)
        stored.append(
            Share(
                name=str(path),
                file=file,
                offset_bytes=info.begin_bytes,
                dtype=dtype,
                shape=info.shape,
                pairs=_pairs(metadata.local_global_slices_pairs),
                whole_shape=tuple(metadata.unsharded_shape),
            )
        )
    try:
        return plan_shards(stored, [wanted], place=str(first.parent))
    except UnmovableError as reason:
        raise Unserved(str(reason)) from reason


def _pairs(pairs: Sequence[Any]) -> list[SlicesPair]:
    return [SlicesPair(tuple(each.local_slices), tuple(each.global_slices)) for each in pairs]


def _dtypes(name: str, tensor: Tensor, header: Header) -> tuple[Dtype, Dtype]:
    """The dtypes of what is stored and of what is wanted. Raises Unserved for what is not cast."""
    stored, wanted = stored_tensor(header).dtype, DTYPES[tensor.dtype]
    if stored not in Dtype.__members__ or Dtype.F64.name in (stored, wanted.name):
        raise Unserved(f"{name} is {wanted.name}, and {stored} in {header.path}")
    return Dtype[stored], wanted
