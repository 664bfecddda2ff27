"""From the shards that a checkpoint has to the shards that this rank wants, as moves.

Both sides say by pairs of slices which part of the whole tensor each of their parts is. What two
of these parts share is one move; the moves of a tensor fill it, or nothing is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nanotron_fast.checkpoints.load import DTYPES
from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.nanotron.checkpoint import TENSOR
from nanotron_fast.formats.safetensors import Header, TensorInfo
from nanotron_fast.moves.boxes import Box, row_major
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.move import Move
from nanotron_fast.moves.pieces import Piece, intersect
from nanotron_fast.patch.nanotron.replacements.checkpoint_files import Unserved

_NUM_DIMS = 3


def stored_tensor(header: Header) -> TensorInfo:
    """The one tensor of a file. Raises CheckpointError where it is not there, Unserved for more."""
    if TENSOR not in header.tensors:
        names = ", ".join(header.tensors) or "nothing"
        raise CheckpointError(f"{header.path}: it holds {names}; a Nanotron file holds {TENSOR!r}")
    if len(header.tensors) > 1:  # of Mamba in 0.4: what weight decay leaves out
        raise Unserved(f"{header.path} holds {', '.join(header.tensors)}")
    return header.tensors[TENSOR]


def whole_move(name: str, tensor: Tensor, index: int, header: Header, file: int) -> list[Move]:
    """Of a file that holds just what a tensor wants; none for an empty tensor.

    Raises CheckpointError where the shapes differ.
    """
    info = stored_tensor(header)
    if info.shape != tuple(tensor.shape):
        raise CheckpointError(
            f"{header.path}: its shape is {list(info.shape)}, and {name} is {list(tensor.shape)}"
        )
    stored, wanted = _dtypes(name, tensor, header)
    sizes, strides = (info.num_elements, 1, 1), (1, 1, 1)
    move = Move(file, info.begin_bytes, index, 0, sizes, strides, strides, stored, wanted)
    return [move] if info.num_elements else []


def shard_moves(
    name: str,
    tensor: Tensor,
    index: int,
    pairs: Sequence[Any],
    shards: Mapping[Path, tuple[int, Header, Any]],
) -> list[Move]:
    """Of the shards that another topology has left, what this rank's shard shares with each.

    Args:
        name, tensor, index: of what is filled; the moves' destination.
        pairs: the SlicesPairs of the tensor.
        shards: for each file its number among the sources, its header and its TensorMetadata.

    Raises:
        CheckpointError: they contradict each other or the tensor, or some of them are missing.
        Unserved: they overlap, or are cut in a way that moves cannot say.
    """
    if tensor.dim() > _NUM_DIMS:
        raise Unserved(f"{name} has {tensor.dim()} dimensions")
    first, (_, _, any_shard) = next(iter(shards.items()))
    whole = tuple(any_shard.unsharded_shape)
    wanted = list(_pieces(name, index, 0, _dtype(tensor), tuple(tensor.shape), pairs, whole))
    if sum(map(_num_elements, wanted)) != tensor.numel():
        raise Unserved(f"the slices of {name} do not make it up")
    moves: list[Move] = []
    for path, (file, header, metadata) in shards.items():
        if tuple(metadata.unsharded_shape) != whole:
            raise CheckpointError(
                f"{path}: it is a shard of a tensor of {list(metadata.unsharded_shape)}, and "
                f"{first.name} of {list(whole)}"
            )
        info = stored_tensor(header)
        dtype, _ = _dtypes(name, tensor, header)
        pieces = _pieces(
            str(path),
            file,
            info.begin_bytes,
            dtype,
            info.shape,
            metadata.local_global_slices_pairs,
            whole,
        )
        for piece in pieces:
            moves += filter(None, (intersect(piece, each) for each in wanted))
    found = sum(move.num_elements for move in moves)
    if found < tensor.numel():
        raise CheckpointError(
            f"{name}: the {len(shards)} shards in {first.parent} hold {found} of the "
            f"{tensor.numel()} elements that this rank needs; some are missing"
        )
    if found > tensor.numel():
        raise Unserved(f"the shards in {first.parent} overlap")
    return moves


def _dtype(tensor: Tensor) -> Dtype:
    return DTYPES[tensor.dtype]


def _dtypes(name: str, tensor: Tensor, header: Header) -> tuple[Dtype, Dtype]:
    """Stored and wanted. Raises Unserved for what is not cast."""
    stored, wanted = stored_tensor(header).dtype, _dtype(tensor)
    if stored not in Dtype.__members__ or Dtype.F64.name in (stored, wanted.name):
        raise Unserved(f"{name} is {wanted.name}, and {stored} in {header.path}")
    return Dtype[stored], wanted


def _pieces(
    where: str,
    file: int,
    begin_bytes: int,
    dtype: Dtype,
    shape: tuple[int, ...],
    pairs: Sequence[Any],
    whole: tuple[int, ...],
) -> Iterator[Piece]:
    """The parts of one shard, by their boxes in the whole tensor. Raises as `shard_moves`."""
    strides = row_major(shape)
    for pair in pairs:
        local = _ranges(where, pair.local_slices, shape)
        part = _ranges(where, pair.global_slices, whole)
        if list(map(len, local)) != list(map(len, part)):
            raise CheckpointError(
                f"{where}: of shape {list(shape)}, and {pair} of a tensor of {list(whole)} is not"
            )
        first = sum(each.start * stride for each, stride in zip(local, strides, strict=True))
        yield Piece(
            file,
            begin_bytes + first * dtype.itemsize,
            dtype,
            _box([each.start for each in part], 0),
            _box([each.stop for each in part], 1),
            _box(strides, 0),
        )


def _ranges(where: str, slices: Sequence[slice], shape: Sequence[int]) -> list[range]:
    if len(slices) != len(shape):
        raise CheckpointError(f"{where}: {len(slices)} slices of {len(shape)} dimensions")
    ranges = [range(size)[each] for each, size in zip(slices, shape, strict=True)]
    if any(each.step != 1 for each in ranges):
        raise Unserved(f"the slices of {where} have steps")
    return ranges


def _box(values: Sequence[int], fill: int) -> Box:
    a, b, c = [fill] * (_NUM_DIMS - len(values)) + [int(value) for value in values]
    return a, b, c


def _num_elements(piece: Piece) -> int:
    a, b, c = (high - low for low, high in zip(piece.low, piece.high, strict=True))
    return a * b * c
