"""The converter's move table on tensors in memory: pack, shard, transpose, cast in one launch.

A move is one 3-D strided copy between two tensors seen as bytes, or a fill with zeros: source,
destination, an offset in bytes into each, sizes and strides in elements, a dtype on each side. A
table has a row of int64 for each, whose columns `nanotron_fast.moves.row` names
(`nanotron_fast.moves.move.table_of` makes one). Everything that lies between Hugging Face's tensors
and Nanotron's shards is a handful of moves.

On a GPU csrc/cuda carries out all of them in one kernel, or a Triton kernel does where the
extension was built without CUDA; native code does on a CPU. Each of them gives the same bytes.

Bytes: every element is read once and written once, in accesses of 16 bytes where both sides are
aligned alike. The floor is that of a device copy of the same size.
It has no gradient: tensors that are written into are part of no graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanotron_fast.kernels.pack.choice import explain
from nanotron_fast.kernels.pack.operators import pack
from nanotron_fast.kernels.pack.reference import pack_reference
from nanotron_fast.kernels.pack.table import DTYPES, as_table
from nanotron_fast.moves.row import Row, columns_of

__all__ = [
    "explain",
    "merge",
    "pack_gate_up",
    "pack_qkv",
    "pack_reference",
    "run",
    "shard",
    "unpack_gate_up",
    "unpack_qkv",
]


def run(
    moves: Iterable[Any] | Tensor, sources: Sequence[Tensor], destinations: Sequence[Tensor]
) -> None:
    """Carries out moves between tensors, in one launch on a GPU, and does not wait for it.

    Args:
        moves: objects with the fields of `nanotron_fast.moves.move.Move`, or a table of int64
            (moves, 15), flat or not: a tensor on the CPU, a numpy array or an array.array. Sources
            and destinations are positions in the lists; -1 as a source fills with zeros.
        sources: contiguous tensors of any dtype and shape: their bytes are what counts.
        destinations: likewise, written in place. What moves write must not overlap, neither among
            themselves nor with what others read; this is not checked.

    Raises:
        PlanError: a move leaves its tensor, or makes no sense; nothing was written then.
        ValueError: a tensor is not contiguous, or they are on several devices.
    """
    table = as_table(moves)
    for kind, tensors in (("source", sources), ("destination", destinations)):
        for index, tensor in enumerate(tensors):
            if not tensor.is_contiguous():
                raise ValueError(
                    f"pack: {kind} {index} {tuple(tensor.shape)} is not contiguous: its strides "
                    f"are {tuple(tensor.stride())}"
                )
    devices = {tensor.device for tensor in (*sources, *destinations)}
    if len(devices) > 1:
        raise ValueError(f"pack: tensors on {', '.join(sorted(map(str, devices)))}")
    pack(table, [t.detach() for t in sources], [t.detach() for t in destinations])


class _Section(NamedTuple):
    """Rows [start, start + size) of one of the whole tensors, `length` rows long.

    They are split over the ranks on their own; the `contiguous_chunks` of Nanotron's are such.
    """

    tensor: int
    start: int
    size: int
    length: int


class _Side(NamedTuple):
    """Where a move reads or writes, in a tensor that is `length` rows long."""

    tensor: int
    first_element: int
    length: int
    dtype: torch.dtype


def _shard_moves(
    name: str,
    sections: Sequence[_Section],
    tp: int,
    ranks: Sequence[int],
    *,
    repeats: int,
    row_elements: int,
    whole_dtype: torch.dtype,
    shard_dtype: torch.dtype,
    joins: bool,
) -> list[Row]:
    """The moves between whole tensors and the shards of these ranks, each section split on its own.

    Args:
        repeats: how many times the rows repeat, for the dimensions before theirs.
        row_elements: elements of a row, in the dimensions after theirs.
        joins: from shards to whole tensors, rather than the other way.
    """
    shard_length = sum(section.size for section in sections) // tp
    moves: list[Row] = []
    first = 0
    for number, section in enumerate(sections):
        if section.size % tp:
            raise ValueError(
                f"{name}: chunk {number} of {section.size} does not split over tp={tp}"
            )
        share = section.size // tp
        for place, rank in enumerate(ranks):
            start = section.start + rank * share
            whole = _Side(section.tensor, start * row_elements, section.length, whole_dtype)
            part = _Side(place, first * row_elements, shard_length, shard_dtype)
            source, destination = (part, whole) if joins else (whole, part)
            if repeats * share * row_elements:
                moves.append(_row(source, destination, (repeats, share, row_elements)))
        first += share
    return moves


def _row(source: _Side, destination: _Side, sizes: tuple[int, int, int]) -> Row:
    row_elements = sizes[2]
    return Row(
        source=source.tensor,
        source_offset=source.first_element * source.dtype.itemsize,
        destination=destination.tensor,
        destination_offset=destination.first_element * destination.dtype.itemsize,
        sizes=sizes,
        source_strides=(source.length * row_elements, row_elements, 1),
        destination_strides=(destination.length * row_elements, row_elements, 1),
        source_dtype=DTYPES.index(source.dtype),
        destination_dtype=DTYPES.index(destination.dtype),
    )


def _check(name: str, tensors: Sequence[Tensor], dim: int, dtype: torch.dtype | None) -> None:
    """Tensors that are packed together are alike but for their length along a dimension."""
    first = tensors[0]
    for tensor in tensors:
        other = [*tensor.shape]
        other[dim : dim + 1] = first.shape[dim : dim + 1]
        if other != [*first.shape] or tensor.dtype != first.dtype:
            raise ValueError(
                f"{name}: {tuple(tensor.shape)} {tensor.dtype} beside {tuple(first.shape)} "
                f"{first.dtype}"
            )
    for kind in (first.dtype, dtype or first.dtype):
        if kind not in DTYPES or (torch.float64 in (kind, first.dtype) and kind != first.dtype):
            raise ValueError(f"{name}: {first.dtype} to {kind} is not one of its casts")


def _split(
    name: str,
    wholes: Sequence[Tensor],
    sections: Sequence[_Section],
    dim: int,
    tp: int,
    rank: int | None,
    dtype: torch.dtype | None,
) -> list[Tensor] | Tensor:
    """Shards of all ranks, or of one."""
    _check(name, wholes, dim, dtype)
    if tp < 1 or (rank is not None and not 0 <= rank < tp):
        raise ValueError(f"{name}: rank {rank} of tp={tp}")
    first, ranks = wholes[0], range(tp) if rank is None else (rank,)
    before, after = first.shape[:dim], first.shape[dim + 1 :]
    shard_dtype = dtype or first.dtype
    moves = _shard_moves(
        name,
        sections,
        tp,
        ranks,
        repeats=math.prod(before),
        row_elements=math.prod(after),
        whole_dtype=first.dtype,
        shard_dtype=shard_dtype,
        joins=False,
    )
    rows = sum(section.size for section in sections) // tp
    shards = [first.new_empty((*before, rows, *after), dtype=shard_dtype) for _ in ranks]
    _run_moves(moves, wholes, shards)
    return shards if rank is None else shards[0]


def _join(
    name: str,
    shards: Sequence[Tensor],
    lengths: Sequence[int],
    sections: Sequence[_Section],
    dim: int,
) -> list[Tensor]:
    """The whole tensors, of these lengths along a dimension."""
    first, tp = shards[0], len(shards)
    _check(name, shards, dim, None)
    for shard in shards:
        if shard.shape != first.shape or shard.shape[dim] * tp != sum(lengths):
            raise ValueError(
                f"{name}: a shard {tuple(shard.shape)} of {tp}, for {sum(lengths)} along {dim}"
            )
    before, after = first.shape[:dim], first.shape[dim + 1 :]
    moves = _shard_moves(
        name,
        sections,
        tp,
        range(tp),
        repeats=math.prod(before),
        row_elements=math.prod(after),
        whole_dtype=first.dtype,
        shard_dtype=first.dtype,
        joins=True,
    )
    wholes = [first.new_empty((*before, length, *after)) for length in lengths]
    _run_moves(moves, shards, wholes)
    return wholes


def _run_moves(moves: list[Row], sources: Sequence[Tensor], destinations: list[Tensor]) -> None:
    if moves:
        rows = [columns_of(move) for move in moves]
        table = torch.tensor(rows, dtype=torch.int64, device="cpu")
        run(table, [source.contiguous() for source in sources], destinations)


def shard(
    tensor: Tensor,
    dim: int,
    tp: int,
    *,
    chunks: Sequence[int] | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor] | Tensor:
    """The shards of a parameter over tp ranks along a dimension, or the one of `rank`.

    Args:
        chunks: lengths along `dim` that are split each on their own, as in Nanotron's packed
            projections: (q, k, v) rows, or (gate, up). By default one, all of it.
        dtype: casts while sharding.

    Raises ValueError where a chunk does not divide by tp.
    """
    dim = range(tensor.dim())[dim]
    length = tensor.shape[dim]
    sizes = (length,) if chunks is None else tuple(chunks)
    if sum(sizes) != length:
        raise ValueError(f"shard: chunks {sizes} add up to {sum(sizes)}, not {length}")
    sections = [_Section(0, sum(sizes[:i]), size, length) for i, size in enumerate(sizes)]
    return _split("shard", [tensor], sections, dim, tp, rank, dtype)


def merge(shards: Sequence[Tensor], dim: int, *, chunks: Sequence[int] | None = None) -> Tensor:
    """The parameter that `shard` made these of, in order of rank. `chunks`: the whole lengths."""
    dim = range(shards[0].dim())[dim]
    length = shards[0].shape[dim] * len(shards)
    sizes = (length,) if chunks is None else tuple(chunks)
    if sum(sizes) != length:
        raise ValueError(f"merge: chunks {sizes} add up to {sum(sizes)}, not {length}")
    sections = [_Section(0, sum(sizes[:i]), size, length) for i, size in enumerate(sizes)]
    return _join("merge", shards, [length], sections, dim)[0]


def pack_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tp: int = 1,
    rank: int | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> list[Tensor] | Tensor:
    """Nanotron's packed projection: rank r's rows are [q_r | k_r | v_r], for each rank or for one.

    q (heads * head_dim, ...), k and v (kv_heads * head_dim, ...): weights or biases, whole heads to
    a rank where tp divides kv_heads. Each shard is ((heads + 2 * kv_heads) * head_dim / tp, ...).
    """
    sections = [_Section(i, 0, len(t), len(t)) for i, t in enumerate((q, k, v))]
    return _split("pack_qkv", [q, k, v], sections, 0, tp, rank, dtype)


def unpack_qkv(
    shards: Tensor | Sequence[Tensor], num_q_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v again, from all ranks' shards. The head counts are the whole model's."""
    shards = [shards] if isinstance(shards, Tensor) else shards
    rows, heads = len(shards[0]) * len(shards), num_q_heads + 2 * num_kv_heads
    if num_q_heads < 1 or num_kv_heads < 1 or rows % heads:
        raise ValueError(f"unpack_qkv: {rows} rows are not those of {heads} heads")
    lengths = [rows // heads * count for count in (num_q_heads, num_kv_heads, num_kv_heads)]
    sections = [_Section(i, 0, length, length) for i, length in enumerate(lengths)]
    q, k, v = _join("unpack_qkv", shards, lengths, sections, 0)
    return q, k, v


def pack_gate_up(
    gate: Tensor,
    up: Tensor,
    tp: int = 1,
    rank: int | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> list[Tensor] | Tensor:
    """Rank r's rows are [gate_r | up_r], of (inter, ...) each: for each rank, or for one."""
    sections = [_Section(i, 0, len(t), len(t)) for i, t in enumerate((gate, up))]
    return _split("pack_gate_up", [gate, up], sections, 0, tp, rank, dtype)


def unpack_gate_up(shards: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """gate and up again, from all ranks' shards."""
    shards = [shards] if isinstance(shards, Tensor) else shards
    rows = len(shards[0]) * len(shards)
    if rows % 2:
        raise ValueError(f"unpack_gate_up: {rows} rows are not two halves")
    sections = [_Section(i, 0, rows // 2, rows // 2) for i in range(2)]
    gate, up = _join("unpack_gate_up", shards, [rows // 2] * 2, sections, 0)
    return gate, up
