"""The quantised tensors of a published model: where their codes and their scales lie.

A tensor is found under the name that its rule gives it, whatever it is stored as: so a rule for a
weight, or for a stack of experts (experts, in, out), reads the quantised form too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from nanotron_fast.errors import CheckpointError, UnsupportedModelError
from nanotron_fast.families.parts import Address
from nanotron_fast.formats.huggingface.checkpoint import HfCheckpoint, StoredTensor
from nanotron_fast.formats.huggingface.quantization import (
    FP8,
    GROUP_BYTES,
    GROUP_ELEMENTS,
    MXFP4,
    Quantization,
    names_of_activation_scales,
    names_of_scales,
    packed_names,
)
from nanotron_fast.moves.boxes import row_major
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.scales import Quantised, ScaleDtype

_CODES = "F8_E4M3"
_SCALE_DTYPES = {
    "F32": ScaleDtype.F32,
    "BF16": ScaleDtype.BF16,
    "F16": ScaleDtype.F16,
    "F8_E8M0": ScaleDtype.E8M0,
    "U8": ScaleDtype.EXPONENT,
}


class QuantisedTensor(NamedTuple):
    """A tensor whose codes have scales.

    Args:
        codes, scales: as they are stored.
        dtype: of an element.
        strides: of the tensor as its rule sees it, in elements.
        scale_dtype, rows, columns, block_rows, block_columns: as in `moves.scales.Scales`.
        names: of all tensors that belong to it.
    """

    codes: StoredTensor
    scales: StoredTensor
    dtype: Quantised
    strides: tuple[int, ...]
    scale_dtype: ScaleDtype
    rows: int
    columns: int
    block_rows: int
    block_columns: int
    names: tuple[str, ...]


class QuantisedTensors:
    """Those of a checkpoint, found by the name and shape that they have once dequantised."""

    def __init__(self, checkpoint: HfCheckpoint) -> None:
        self._tensors = checkpoint.tensors
        self._quantization = checkpoint.quantization
        self._found: dict[str, QuantisedTensor | None] = {}
        # What they become where no other dtype is asked for.
        stated = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
        self.dtype = next((each for each in Dtype if each.torch_name == stated), Dtype.BF16)

    def find(self, address: Address) -> QuantisedTensor | None:
        """The tensor, or None where it is not quantised.

        Raises CheckpointError, UnsupportedModelError.
        """
        if self._quantization is None:
            return None
        if address.name not in self._found:
            self._found[address.name] = self._look(address, self._quantization)
        return self._found[address.name]

    def _look(self, address: Address, quantization: Quantization) -> QuantisedTensor | None:
        stored = self._tensors.get(address.name)
        if quantization.method == MXFP4 and stored is None:
            return self._packed(address)
        if quantization.method != FP8 or stored is None or stored.info.dtype != _CODES:
            return None
        return self._fp8(address, stored, quantization)

    def _fp8(
        self, address: Address, codes: StoredTensor, quantization: Quantization
    ) -> QuantisedTensor:
        name, shape = address.name, codes.info.shape
        wanted = tuple(names_of_scales(name))
        beside = next((each for each in wanted if each in self._tensors), None)
        if beside is None:
            raise CheckpointError(
                f"{codes.path}: {name} is {_CODES}, and its scales are missing: {wanted[0]} or "
                f"{', '.join(wanted[1:])}"
            )
        if len(shape) < 2 or not all(shape):
            raise CheckpointError(f"{codes.path}: {name} is {_CODES} and has shape {list(shape)}")
        scales = self._tensors[beside]
        self._check_whole(name, codes)
        self._check_whole(beside, scales)
        scale_dtype = _SCALE_DTYPES.get(scales.info.dtype)
        if scale_dtype is None:
            raise UnsupportedModelError(
                f"{scales.path}: {beside} is {scales.info.dtype}, and scales are "
                f"{', '.join(_SCALE_DTYPES)}"
            )
        rows, block = _blocks(shape, scales.info.shape, quantization.block)
        if block is None:
            grid = [-(-size // by) for size, by in zip(shape[-2:], quantization.block, strict=True)]
            raise CheckpointError(
                f"{scales.path}: {beside} has shape {list(scales.info.shape)}; {name} of "
                f"{list(shape)} has {[*shape[:-2], *grid]} blocks of "
                f"{'x'.join(map(str, quantization.block))}, {shape[-2]} rows, or one scale"
            )
        idle = [each for each in names_of_activation_scales(name) if each in self._tensors]
        return QuantisedTensor(
            codes=codes,
            scales=scales,
            dtype=Quantised.E4M3,
            strides=row_major(shape),
            scale_dtype=scale_dtype,
            rows=rows,
            columns=shape[-1],
            block_rows=block[0],
            block_columns=block[1],
            names=(name, beside, *idle),
        )

    def _packed(self, address: Address) -> QuantisedTensor | None:
        """A stack (..., in, out), whose codes are those of (..., out, in)."""
        names = packed_names(address.name)
        codes, scales = (self._tensors.get(name) for name in names)
        if codes is None and scales is None:
            return None
        if codes is None or scales is None:
            there, absent = names if scales is None else names[::-1]
            raise CheckpointError(
                f"{self._tensors[there].path}: {there} is there, and {absent} is missing: "
                f"{MXFP4} takes both"
            )
        for name, tensor in zip(names, (codes, scales), strict=True):
            self._check_whole(name, tensor)
            if tensor.info.dtype != "U8":
                raise UnsupportedModelError(
                    f"{tensor.path}: {name} is {tensor.info.dtype}, and U8 in {MXFP4}"
                )
        *stack, inside, outside = address.shape
        shape = (*stack, outside, -(-inside // GROUP_ELEMENTS))
        if codes.info.shape != (*shape, GROUP_BYTES) or scales.info.shape != shape:
            raise CheckpointError(
                f"{codes.path}: {names[0]} has shape {list(codes.info.shape)} and {names[1]} "
                f"{list(scales.info.shape)}; {address.name} of {list(address.shape)} takes "
                f"{[*shape, GROUP_BYTES]} and {list(shape)}"
            )
        if inside % GROUP_ELEMENTS:
            raise CheckpointError(
                f"{codes.path}: {names[0]}: {inside} is not a multiple of {GROUP_ELEMENTS}"
            )
        *outer, _, _ = row_major(address.shape)
        return QuantisedTensor(
            codes=codes,
            scales=scales,
            dtype=Quantised.E2M1,
            strides=(*outer, 1, inside),
            scale_dtype=ScaleDtype.MICRO,
            rows=math.prod(stack) * outside,
            columns=inside // 2,
            block_rows=1,
            block_columns=GROUP_BYTES,
            names=names,
        )

    @staticmethod
    def _check_whole(name: str, tensor: StoredTensor) -> None:
        if tensor.chunks:
            raise UnsupportedModelError(
                f"{tensor.path}: {name} lies in chunks, and what is quantised is read from "
                "safetensors alone"
            )


def _blocks(
    shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int]
) -> tuple[int, tuple[int, int] | None]:
    """Rows of a matrix, and what one scale is for; None where the shapes do not go together."""
    *stack, rows, columns = shape
    all_rows = math.prod(stack) * rows
    grid = (*stack, -(-rows // block[0]), -(-columns // block[1]))
    if scales == grid:
        # A block is no larger than the matrix, whatever is stated.
        return rows, (min(block[0], rows), min(block[1], columns))
    if math.prod(scales) == 1:
        return all_rows, (all_rows, columns)
    if scales in ((*stack, rows), (*stack, rows, 1)):
        return rows, (1, columns)
    if stack and scales in ((*stack,), (*stack, 1), (*stack, 1, 1)):
        return rows, (rows, columns)
    return rows, None
