"""The packer, by its Triton kernel and by the CUDA extension: every byte must be right."""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.gpu.context import Context
from benchmarks.gpu.harness import Builder, Check, LeftOut, check, precompile
from nanotron_fast.kernels import pack
from nanotron_fast.kernels.pack import kernels as pack_kernel
from nanotron_fast.kernels.pack.item import COPY, NUM_COLUMNS, TRANSPOSE
from nanotron_fast.kernels.pack.table import DTYPES
from nanotron_fast.kernels.runtime.backend import ENVIRONMENT_VARIABLE
from nanotron_fast.moves.row import Row, columns_of

__all__ = ["BUILDERS", "check", "precompile"]

_RANKS = 4


def _item(
    source: Tensor,
    destination: Tensor,
    kind: int,
    sizes: tuple[int, int],
    steps: tuple[int, int, int, int],
    first_tile: int,
) -> tuple[bytes, int]:
    """One item of a launch as csrc/core/tiles.h has it, and the number of its tiles.

    `sizes`: middle and inner; `steps`: of the source along both, then of the destination, in bytes.
    """
    tile = (1, min(sizes[1], 4096)) if kind == COPY else (64, 64)
    tiles = [-(-size // length) for size, length in zip(sizes, tile, strict=True)]
    fields = (kind, 0, 0, 2 if kind == COPY else 1, *tile, *tiles)
    addresses = (source.data_ptr(), destination.data_ptr())
    strides = (0, *steps[:2], 0, *steps[2:])
    return struct.pack("12q8i", *addresses, 1, *sizes, *strides, first_tile, *fields), (
        tiles[0] * tiles[1]
    )


def _launch(parts: Sequence[tuple[Tensor, Tensor]], kind: int) -> None:
    """The kernel by itself, where the native code that lists its items was not built."""
    items, num_tiles = b"", 0
    for source, destination in parts:
        width = source.element_size()
        if kind == COPY:
            sizes, steps = (1, source.numel() * width), (0, 1, 0, 1)
        else:
            rows, columns = source.shape
            sizes, steps = (columns, rows), (width, columns * width, rows * width, width)
        item, tiles = _item(source, destination, kind, sizes, steps, num_tiles)
        items, num_tiles = items + item, num_tiles + tiles
    table = torch.frombuffer(bytearray(items), dtype=torch.int64).view(-1, NUM_COLUMNS)
    pack_kernel.launch(table.to(parts[0][0].device), num_tiles)


def _pack_qkv(tensors: Sequence[Tensor], is_native: bool) -> list[Tensor]:
    if is_native:
        return list(pack.pack_qkv(*tensors, _RANKS))
    shards = [torch.cat(part) for part in zip(*(t.chunk(_RANKS) for t in tensors), strict=True)]
    results = [torch.full_like(shard, float("nan")) for shard in shards]
    parts = []
    for rank, result in enumerate(results):
        pieces = [t.chunk(_RANKS)[rank] for t in tensors]
        ends = [0, *itertools.accumulate(len(piece) for piece in pieces)]
        parts += [
            (piece, result[a:b])
            for piece, (a, b) in zip(pieces, itertools.pairwise(ends), strict=True)
        ]
    _launch(parts, COPY)
    return results


def _transpose(tensor: Tensor, is_native: bool) -> Tensor:
    rows, columns = tensor.shape
    result = torch.full((columns, rows), float("nan"), dtype=tensor.dtype, device=tensor.device)
    if is_native:
        code = DTYPES.index(tensor.dtype)
        move = Row(
            source=0,
            source_offset=0,
            destination=0,
            destination_offset=0,
            sizes=(1, columns, rows),
            source_strides=(0, 1, columns),
            destination_strides=(0, rows, 1),
            source_dtype=code,
            destination_dtype=code,
        )
        pack.run(torch.tensor([columns_of(move)]), [tensor], [result])
    else:
        _launch([(tensor, result)], TRANSPOSE)
    return result


def _pack(variant: str, context: Context) -> Check:
    backend, case = variant.split(" ")
    # The one item table that a graph can capture is that which is an argument of the CUDA launch.
    of_triton = "the Triton packer copies its table from the host in each launch"
    is_native = find_spec("nanotron_fast._C") is not None
    os.environ[ENVIRONMENT_VARIABLE] = "triton" if backend == "triton" else "auto"
    if backend == "cuda":
        path, why = pack.explain(context.device)
        if path != "cuda":
            raise LeftOut(f"the CUDA packer is not here: {why}; {of_triton}")
    if case == "qkv":
        rows = ((4096, 1024, 1024), 4096) if not context.dry else ((16, 8, 8), 24)
        inputs = [torch.randn(n, rows[1], device=context.device).bfloat16() for n in rows[0]]
    else:
        shape = (4096, 14336) if not context.dry else (37, 70)
        inputs = [torch.randn(shape, device=context.device).bfloat16()]

    def ours(*tensors: Tensor) -> list[Tensor]:
        if case == "qkv":
            return _pack_qkv(tensors, is_native)
        return [_transpose(tensors[0], is_native)]

    def reference(*tensors: Tensor) -> list[Tensor]:
        if case == "transpose":
            return [tensors[0].t()]
        return [torch.cat(part) for part in zip(*(t.chunk(_RANKS) for t in tensors), strict=True)]

    return Check(
        inputs,
        ours,
        reference,
        tolerances={torch.bfloat16: 0.0},
        path="" if backend == "triton" else "cuda",
        not_captured=of_triton if backend == "triton" else "",
        not_compiled="" if is_native else "the native code, part of the operator, is not built",
    )


BUILDERS: dict[str, Builder] = {"pack": _pack}
