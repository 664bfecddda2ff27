"""The same plans executed with numpy: slowly, in few lines. The engine is tested against this."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.move import Move
from nanotron_fast.moves.plan import MovePlan
from nanotron_fast.moves.row import FILL
from nanotron_fast.moves.scales import Code, ScaleDtype, value_of

# bfloat16 is held as its bits.
_NUMPY: dict[Dtype, Any] = {
    Dtype.BF16: np.uint16,
    Dtype.F16: np.float16,
    Dtype.F32: np.float32,
    Dtype.F64: np.float64,
}


def cast(values: np.ndarray, source: Dtype, destination: Dtype) -> np.ndarray:
    """Casts values with ties to even; NaN has the bits that torch's vectorised code gives it."""
    if source is destination:
        return values
    if source is Dtype.BF16:
        wide = (values.astype(np.uint32) << 16).view(np.float32)
    else:
        with np.errstate(invalid="ignore"):
            wide = values.astype(np.float32)
    nan = np.isnan(wide)
    bits = np.ascontiguousarray(wide).view(np.uint32)
    if destination is Dtype.BF16:
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        rounded[nan] = 0x7FC0 if source is Dtype.F16 else 0xFFFF
        return rounded
    # numpy leaves a signalling NaN signalling, or not, depending on how it was built.
    if destination is Dtype.F16:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            half = wide.astype(np.float16)
        sign, payload = (bits[nan] >> 16) & 0x8000, (bits[nan] >> 13) & 0x3FF
        half.view(np.uint16)[nan] = sign | 0x7E00 | payload
        return half
    if source is Dtype.F16:
        bits[nan] |= 0x0040_0000
    return bits.view(np.float32)


def dequantise(move: Move, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The values of a move from a quantised source, in its destination's dtype.

    `codes` and `scales` are the bytes of the two files that it reads.
    """
    assert isinstance(move.source_dtype, Code)
    assert move.scales is not None
    grid = move.scales
    place = np.full(move.sizes, move.source_offset - grid.codes_offset, np.int64)
    for index, stride in zip(np.indices(move.sizes), move.source_strides, strict=True):
        place += index * stride
    row, column = np.divmod(place, grid.columns)
    matrix, row = np.divmod(row, grid.rows)
    number = matrix * -(-grid.rows // grid.block_rows) + row // grid.block_rows
    number = number * grid.grid_columns + column // grid.block_columns
    values = np.array([value_of(move.source_dtype, byte) for byte in range(256)], np.float32)
    if move.source_dtype is Code.E4M3:
        # torch's NaN of eight bits.
        values.view(np.uint32)[[0x7F, 0xFF]] = 0x7FF0_0000, 0xFFF0_0000
    stored = scales[grid.offset :]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        factors = _scales(stored, int(number.max()) + 1, grid.dtype)
        product = values[codes[grid.codes_offset + place]] * factors[number]
    return cast(product, Dtype.F32, move.destination_dtype)


def _scales(stored: np.ndarray, count: int, dtype: ScaleDtype) -> np.ndarray:
    """The first `count` scales in fp32; those of E2M1 halved."""
    stored = stored[: count * dtype.itemsize].copy()
    if dtype is ScaleDtype.F32:
        return stored.view(np.float32)
    if dtype in (ScaleDtype.BF16, ScaleDtype.F16):
        half = Dtype.BF16 if dtype is ScaleDtype.BF16 else Dtype.F16
        return cast(stored.view(_NUMPY[half]), half, Dtype.F32)
    exponent = stored.astype(np.int32) - (128 if dtype is ScaleDtype.MICRO else 127)
    factors = np.ldexp(np.float32(1), exponent)
    if dtype is ScaleDtype.E8M0:
        factors[stored == 255] = np.nan
    return factors


def _view(
    data: np.ndarray, offset: int, dtype: Dtype, sizes: Sequence[int], strides: Sequence[int]
) -> np.ndarray:
    size = dtype.itemsize
    end = offset + size * (1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)))
    flat = data[offset:end].view(_NUMPY[dtype])
    return as_strided(flat, sizes, [stride * size for stride in strides])


def apply_move(
    move: Move,
    source: np.ndarray | None,
    destination: np.ndarray,
    scales: np.ndarray | None = None,
) -> None:
    """Carries out one move between two files' bytes; offsets need no alignment.

    `scales` are those of the file that the scales of a quantised source are in.
    """
    target = np.zeros(move.sizes, _NUMPY[move.destination_dtype])
    if isinstance(move.source_dtype, Code):
        assert source is not None
        assert scales is not None
        target = dequantise(move, source, scales)
    elif move.source != FILL:
        assert source is not None
        values = _view(
            source, move.source_offset, move.source_dtype, move.sizes, move.source_strides
        )
        target = cast(values.copy(), move.source_dtype, move.destination_dtype)
    _view(
        destination,
        move.destination_offset,
        move.destination_dtype,
        move.sizes,
        move.destination_strides,
    )[...] = target


def execute_in_memory(plan: MovePlan) -> dict[str, np.ndarray]:
    """Every output of a plan as bytes, by its path."""
    sources = [np.fromfile(path, np.uint8) for path in plan.sources]
    outputs = [np.zeros(output.size_bytes, np.uint8) for output in plan.outputs]
    for data, output in zip(outputs, plan.outputs, strict=True):
        data[: len(output.header)] = np.frombuffer(output.header, np.uint8)
    for move in plan.moves:
        source = None if move.source == FILL else sources[move.source]
        scales = None if move.scales is None else sources[move.scales.source]
        apply_move(move, source, outputs[move.destination], scales)
    return {output.path: data for output, data in zip(plan.outputs, outputs, strict=True)}


def execute(plan: MovePlan, root: Path) -> None:
    """Writes every output of a plan under `root`."""
    for path, data in execute_in_memory(plan).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        data.tofile(root / path)
