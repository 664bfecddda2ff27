"""The converter's move table on tensors in memory: pack, shard, transpose, cast in one launch.

A move is one 3-D strided copy between two tensors seen as bytes, or a fill with zeros: source,
destination, an offset in bytes into each, sizes and strides in elements, a dtype on each side. A
table has a row of 15 int64 for each (`nanotron_fast.moves.move.table_of` makes one). Everything
that lies between Hugging Face's tensors and Nanotron's shards is a handful of moves.

On a GPU csrc/cuda carries out all of them in one kernel, or a Triton kernel does where the
extension was built without CUDA; native code does on a CPU. Each of them gives the same bytes.

Bytes: every element is read once and written once, in accesses of 16 bytes where both sides are
aligned alike. The floor is that of a device copy of the same size.
Not differentiable: what is written into is not part of any graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanotron_fast.kernels.pack import choice as pack_backends
from nanotron_fast.kernels.pack.choice import DTYPES, explain, pack_reference, table_of
from nanotron_fast.kernels.runtime.backend import operator

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


@operator("nanotron_fast::pack", mutates_args=("destinations",))
def _pack(table: Tensor, sources: list[Tensor], destinations: list[Tensor]) -> None:
    pack_backends.run(table, sources, destinations)


@_pack.register_fake
def _(table, sources, destinations):
    return None


def run(
    moves: Iterable[Any] | Tensor, sources: Sequence[Tensor], destinations: Sequence[Tensor]
) -> None:
    """Carries out moves between tensors, in one launch on a GPU, and does not wait for it.

    Args:
        moves: objects with the fields of `nanotron_fast.moves.move.Move`, or a table of int64
            (moves, 15), flat or not: a tensor on the CPU, a numpy array or an array.array. Sources
            and destinations are positions in the lists, -1 as a source fills with zeros.
        sources: contiguous tensors of any dtype and shape: their bytes are what counts.
        destinations: likewise, written in place. What moves write must not overlap, neither among
            themselves nor with what others read; this is not checked.

    Raises:
        PlanError: a move leaves its tensor, or makes no sense; nothing was written then.
        ValueError: a tensor is not contiguous, or they are on several devices.
    """
    table = table_of(moves)
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
    _pack(table, [t.detach() for t in sources], [t.detach() for t in destinations])


class _Chunk(NamedTuple):
    """Rows [start, start + size) of one of the whole tensors, `length` rows long."""

    tensor: int
    start: int
    size: int
    length: int


def _shard_moves(
    name: str,
    chunks: Sequence[_Chunk],
    tp: int,
    ranks: Sequence[int],
    box: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    *,
    joins: bool,
) -> list[list[int]]:
    """Rows of a table between whole tensors and shards, each chunk split on its own.

    `box`: elements around a row: how many times rows repeat, and elements of one. `dtypes`: of the
    whole tensors, of the shards.
    """
    outer, inner = box
    local = sum(chunk.size for chunk in chunks) // tp
    table: list[list[int]] = []
    first = 0
    for number, chunk in enumerate(chunks):
        if chunk.size % tp:
            raise ValueError(f"{name}: chunk {number} of {chunk.size} does not split over tp={tp}")
        share = chunk.size // tp
        for place, rank in enumerate(ranks):
            whole = (chunk.tensor, (chunk.start + rank * share) * inner, chunk.length, dtypes[0])
            part = (place, first * inner, local, dtypes[1])
            a, b = (part, whole) if joins else (whole, part)
            if outer * share * inner == 0:
                continue
            table.append([
                a[0], a[1] * a[3].itemsize, b[0], b[1] * b[3].itemsize, outer, share, inner,
                a[2] * inner, inner, 1, b[2] * inner, inner, 1, DTYPES.index(a[3]),
                DTYPES.index(b[3]),
            ])  # fmt: skip
        first += share
    return table


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
    chunks: Sequence[_Chunk],
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
    dtypes = first.dtype, dtype or first.dtype
    box = math.prod(before), math.prod(after)
    table = _shard_moves(name, chunks, tp, ranks, box, dtypes, joins=False)
    rows = sum(chunk.size for chunk in chunks) // tp
    shards = [first.new_empty((*before, rows, *after), dtype=dtypes[1]) for _ in ranks]
    _run_rows(table, wholes, shards)
    return shards if rank is None else shards[0]


def _join(
    name: str, shards: Sequence[Tensor], lengths: Sequence[int], chunks: Sequence[_Chunk], dim: int
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
    box = math.prod(before), math.prod(after)
    dtypes = first.dtype, first.dtype
    table = _shard_moves(name, chunks, tp, range(tp), box, dtypes, joins=True)
    wholes = [first.new_empty((*before, length, *after)) for length in lengths]
    _run_rows(table, shards, wholes)
    return wholes


def _run_rows(rows: list[list[int]], sources: Sequence[Tensor], destinations: list[Tensor]) -> None:
    if rows:
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
    pieces = [_Chunk(0, sum(sizes[:i]), size, length) for i, size in enumerate(sizes)]
    return _split("shard", [tensor], pieces, dim, tp, rank, dtype)


def merge(shards: Sequence[Tensor], dim: int, *, chunks: Sequence[int] | None = None) -> Tensor:
    """The parameter that `shard` made these of, in order of rank. `chunks`: the whole lengths."""
    dim = range(shards[0].dim())[dim]
    length = shards[0].shape[dim] * len(shards)
    sizes = (length,) if chunks is None else tuple(chunks)
    if sum(sizes) != length:
        raise ValueError(f"merge: chunks {sizes} add up to {sum(sizes)}, not {length}")
    pieces = [_Chunk(0, sum(sizes[:i]), size, length) for i, size in enumerate(sizes)]
    return _join("merge", shards, [length], pieces, dim)[0]


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
    pieces = [_Chunk(i, 0, len(t), len(t)) for i, t in enumerate((q, k, v))]
    return _split("pack_qkv", [q, k, v], pieces, 0, tp, rank, dtype)


def unpack_qkv(
    shards: Tensor | Sequence[Tensor], num_q_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v again, from all ranks' shards. The head counts are the whole model's."""
    shards = [shards] if isinstance(shards, Tensor) else shards
    rows, heads = len(shards[0]) * len(shards), num_q_heads + 2 * num_kv_heads
    if rows % heads:
        raise ValueError(f"unpack_qkv: {rows} rows are not those of {heads} heads")
    lengths = [rows // heads * count for count in (num_q_heads, num_kv_heads, num_kv_heads)]
    pieces = [_Chunk(i, 0, length, length) for i, length in enumerate(lengths)]
    q, k, v = _join("unpack_qkv", shards, lengths, pieces, 0)
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
    pieces = [_Chunk(i, 0, len(t), len(t)) for i, t in enumerate((gate, up))]
    return _split("pack_gate_up", [gate, up], pieces, 0, tp, rank, dtype)


def unpack_gate_up(shards: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """gate and up again, from all ranks' shards."""
    shards = [shards] if isinstance(shards, Tensor) else shards
    rows = len(shards[0]) * len(shards)
    if rows % 2:
        raise ValueError(f"unpack_gate_up: {rows} rows are not two halves")
    pieces = [_Chunk(i, 0, rows // 2, rows // 2) for i in range(2)]
    gate, up = _join("unpack_gate_up", shards, [rows // 2] * 2, pieces, 0)
    return gate, up
