"""A table of moves in plain torch: what the kernels and the native code are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from nanotron_fast.kernels.pack.table import DTYPES, tiles_of
from nanotron_fast.moves import row


def cast_reference(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds to nearest even; NaN has the bits that csrc/cast gives it on every device."""
    result = values.to(dtype)
    if values.dtype == dtype:
        return result
    nan = values.isnan()
    if dtype == torch.bfloat16:
        return result.view(torch.int16).masked_fill(
            nan, 0x7FC0 if values.dtype == torch.float16 else -1
        ).view(dtype)  # fmt: skip
    if values.dtype == torch.float16:
        bits = values.view(torch.int16).int()
        quiet = ((bits & 0x8000) << 16) | 0x7FC00000 | ((bits & 0x3FF) << 13)
        return torch.where(nan, quiet, result.view(torch.int32)).view(dtype)
    if dtype == torch.float32:
        return result
    if values.dtype == torch.bfloat16:
        bits = values.view(torch.int16).int() << 16
    else:
        bits = values.view(torch.int32)
    quiet = ((bits >> 16) & 0x8000) | 0x7E00 | ((bits >> 13) & 0x3FF)
    return torch.where(nan, quiet.to(torch.int16), result.view(torch.int16)).view(dtype)


def pack_reference(table: Tensor, sources: list[Tensor], destinations: list[Tensor]) -> None:
    """One strided copy after the other, in plain torch."""
    tiles_of(table, sources, destinations)
    for move in table.tolist():
        sizes, offset = move[row.SIZES], move[row.DESTINATION_OFFSET]
        data = destinations[move[row.DESTINATION]].reshape(-1).view(torch.uint8)
        dtype = DTYPES[move[row.DESTINATION_DTYPE]]
        target, span = _elements(data, offset, dtype, sizes, move[row.DESTINATION_STRIDES])
        if move[row.SOURCE] == row.FILL:
            target.zero_()
        else:
            values, _ = _elements(
                sources[move[row.SOURCE]].reshape(-1).view(torch.uint8),
                move[row.SOURCE_OFFSET],
                DTYPES[move[row.SOURCE_DTYPE]],
                sizes,
                move[row.SOURCE_STRIDES],
            )
            target.copy_(cast_reference(values, dtype))
        data[offset : offset + span.numel()] = span


def _elements(
    data: Tensor, offset: int, dtype: torch.dtype, sizes: list[int], strides: list[int]
) -> tuple[Tensor, Tensor]:
    """A copy of a move's box, and the bytes from its first element to its last, which hold it."""
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    # A copy is aligned; where it comes from need not be.
    span = data[offset : offset + (last + 1) * dtype.itemsize].clone()
    return span.view(dtype).as_strided(sizes, strides), span
