"""Quantised tensors and what becomes of them, as hypothesis strategies.

Of a plan, one or two tensors of one shape are written side by side, every second row, column or
plane from each, with their dimensions in any order, cut into shards wherever it may be.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nanotron_fast.moves.boxes import Box
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.move import Move
from nanotron_fast.moves.pieces import Piece, moves_between
from nanotron_fast.moves.plan import MovePlan, OutputFile
from nanotron_fast.moves.scales import Quantised, ScaleDtype, Scales
from tests.strides import packed, permuted

TORCH = {Dtype.BF16: torch.bfloat16, Dtype.F16: torch.float16, Dtype.F32: torch.float32}
BITS = {2: torch.int16, 4: torch.int32}
CODES, SCALES = 0, 1  # the source files of a plan


@dataclass(frozen=True)
class Tensor:
    """Random codes in matrices, and their scales. `shape` and `block` count elements."""

    dtype: Quantised
    shape: Box
    block: tuple[int, int]
    scale_dtype: ScaleDtype
    codes: np.ndarray
    scales: np.ndarray

    def values(self, dtype: Dtype) -> torch.Tensor:
        """What transformers makes of it."""
        matrices, rows, _columns = self.shape
        if self.dtype is Quantised.E2M1:
            blocks = torch.from_numpy(self.codes.copy()).reshape(matrices, rows, -1, 16)
            scales = torch.from_numpy(self.scales.copy()).reshape(matrices, rows, -1)
            return convert_moe_packed_tensors(blocks, scales, dtype=TORCH[dtype]).transpose(1, 2)
        codes = torch.from_numpy(self.codes.copy()).view(torch.float8_e4m3fn).reshape(self.shape)
        return (codes.float() * self._factors()).to(TORCH[dtype])

    def _factors(self) -> torch.Tensor:
        """Of each element."""
        stored = torch.from_numpy(self.scales.copy())
        if self.scale_dtype is ScaleDtype.EXPONENT:
            wide = (stored.float() - 127).exp2()
        else:
            wide = stored.view(getattr(torch, _TORCH_NAME[self.scale_dtype])).float()
        matrices, rows, columns = self.shape
        grid = wide.reshape(matrices, -(-rows // self.block[0]), -(-columns // self.block[1]))
        grid = grid.repeat_interleave(self.block[0], 1)[:, :rows]
        return grid.repeat_interleave(self.block[1], 2)[:, :, :columns]

    def piece(self, codes_offset: int, scales_offset: int) -> Piece:
        """All of it, as a source."""
        per_byte = 2 if self.dtype is Quantised.E2M1 else 1
        scales = Scales(
            source=SCALES,
            offset=scales_offset,
            dtype=self.scale_dtype,
            codes_offset=codes_offset,
            rows=self.shape[1],
            columns=self.shape[2] // per_byte,
            block_rows=self.block[0],
            block_columns=self.block[1] // per_byte,
        )
        low, strides = (0, 0, 0), packed(self.shape)
        return Piece(CODES, codes_offset, self.dtype, low, self.shape, strides, scales)


_BLOCKS = ((128, 128), (4, 3), (5, 7), (2, 16), (16, 1))
_TORCH_NAME = {
    ScaleDtype.F32: "float32",
    ScaleDtype.BF16: "bfloat16",
    ScaleDtype.F16: "float16",
    ScaleDtype.E8M0: "float8_e8m0fnu",
}


@dataclass(frozen=True)
class Build:
    """A plan's files and moves, and the bytes that its outputs should have."""

    sources: tuple[bytes, bytes]
    sizes: tuple[int, ...]
    moves: tuple[Move, ...]
    expected: tuple[bytes, ...]

    def plan(self, folder: Path) -> MovePlan:
        """The plan, its sources written to a folder."""
        paths = (folder / "codes", folder / "scales")
        for path, data in zip(paths, self.sources, strict=True):
            path.write_bytes(data)
        outputs = (OutputFile(f"{i}", b"", size) for i, size in enumerate(self.sizes))
        return MovePlan(paths, tuple(outputs), self.moves)


def bytes_of(values: torch.Tensor) -> bytes:
    return values.contiguous().view(BITS[values.dtype.itemsize]).numpy().tobytes()


@st.composite
def tensors(draw: Any, shape: Box, dtype: Quantised) -> Tensor:
    """A tensor of a shape; every code is among the random ones, NaN too."""
    matrices, rows, columns = shape
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    if dtype is Quantised.E2M1:
        codes = random.integers(0, 256, matrices * rows * columns // 2, np.uint8)
        scales = random.integers(0, 256, matrices * rows * columns // 32, np.uint8)
        return Tensor(dtype, shape, (1, 32), ScaleDtype.MICRO, codes, scales)
    block = draw(st.sampled_from([*_BLOCKS, (1, columns), (rows, columns)]))
    scale_dtype = draw(st.sampled_from([each for each in ScaleDtype if each is not each.MICRO]))
    count = matrices * -(-rows // block[0]) * -(-columns // block[1])
    if scale_dtype in (ScaleDtype.E8M0, ScaleDtype.EXPONENT):
        scales = random.integers(0, 255, count, np.uint8)
    else:
        factors = torch.from_numpy(random.normal(0, 1, count) * 10.0 ** random.integers(-9, 9))
        scales = factors.to(getattr(torch, _TORCH_NAME[scale_dtype])).view(torch.uint8).numpy()
    codes = random.integers(0, 256, matrices * rows * columns, np.uint8)
    return Tensor(dtype, shape, block, scale_dtype, codes, scales)


@st.composite
def builds(draw: Any, most: int = 150) -> Build:
    """A plan that writes one or two tensors of a shape, every byte of its outputs once."""
    dtype = draw(st.sampled_from(Quantised))
    sizes = st.one_of(st.integers(1, 9), st.integers(1, most))
    columns = 32 * draw(st.integers(1, 5)) if dtype is Quantised.E2M1 else draw(sizes)
    shape = (draw(st.integers(1, 3)), draw(sizes), columns)
    written = draw(st.sampled_from([Dtype.BF16, Dtype.F16, Dtype.F32]))
    files, pieces, values = [bytearray(), bytearray()], [], []
    for _ in range(draw(st.integers(1, 2))):
        tensor = draw(tensors(shape, dtype))
        offsets = []
        for file, data in zip(files, (tensor.codes, tensor.scales), strict=True):
            file += bytes(draw(st.integers(0, 3)))
            offsets.append(len(file))
            file += data.tobytes()
        pieces.append(tensor.piece(*offsets))
        values.append(tensor.values(written))
    order, dim = draw(st.permutations(range(3))), draw(st.sampled_from([0, 1, 2, 2]))
    cuts = sorted({0, shape[dim], *draw(st.lists(st.integers(0, shape[dim]), max_size=2))})
    moves: list[Move] = []
    expected: list[bytes] = []
    along = draw(st.integers(0, 2))  # where two tensors interleave
    for number, (low, high) in enumerate(itertools.pairwise(cuts)):
        box = (*shape[:dim], high - low, *shape[dim + 1 :])
        wide = (*box[:along], box[along] * len(pieces), *box[along + 1 :])
        strides = permuted(wide, order)
        part = torch.stack([each.narrow(dim, low, high - low) for each in values], along + 1)
        expected.append(bytes_of(part.reshape(wide).permute(*order)))
        step = (*strides[:along], strides[along] * len(pieces), *strides[along + 1 :])
        for which, piece in enumerate(pieces):
            begin = which * strides[along] * written.itemsize
            first, end = [0, 0, 0], list(shape)
            first[dim], end[dim] = low, high
            target = Piece(number, begin, written, tuple(first), tuple(end), step)
            moves += moves_between(piece, target)
    sizes_bytes = tuple(map(len, expected))
    sources = bytes(files[CODES]), bytes(files[SCALES])
    return Build(sources, sizes_bytes, tuple(draw(st.permutations(moves))), tuple(expected))
