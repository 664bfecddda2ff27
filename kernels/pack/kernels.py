"""The packer in Triton: what csrc/cuda does, where the extension for it was not built.

One program takes one tile. It finds its item by bisection, and branches on the item's kind; the
columns of an item are named in `item`, and csrc/core/tiles.h says what they mean. Casts are made in
integers, so that NaN has the bits that csrc/cast gives it.

Shapes: items (num_items, NUM_COLUMNS) int64; grid (num_tiles,).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanotron_fast.kernels.pack import item as layout
from nanotron_fast.kernels.pack.table import DTYPES
from nanotron_fast.kernels.runtime.launch import on_grid
from nanotron_fast.kernels.runtime.tuning import Tuned, powers_of_2

# The columns of a tile that is transposed: csrc/core/tiles.h cuts it so.
_BLOCK_INNER = 64


@dataclass(frozen=True)
class _Blocks(Tuned, operation="pack", middle=powers_of_2(1, 1024)):
    """`block` units of a tile at a time, or `middle` rows of one that is transposed."""

    block: int
    middle: int
    num_warps: int

    @classmethod
    def rule(cls) -> _Blocks:
        return cls(1024, 32, 8)

    def candidates(self) -> list[_Blocks]:
        return [_Blocks(*each) for each in ((1024, 32, 4), (2048, 32, 8), (1024, 64, 8))]


# Triton reads global names where they are constants of its own.
_SOURCE = tl.constexpr(layout.SOURCE)
_DESTINATION = tl.constexpr(layout.DESTINATION)
_SIZES = tl.constexpr(layout.SIZES)
_SOURCE_STRIDES = tl.constexpr(layout.SOURCE_STRIDES)
_DESTINATION_STRIDES = tl.constexpr(layout.DESTINATION_STRIDES)
_FIRST_TILE = tl.constexpr(layout.FIRST_TILE)
_KIND = tl.constexpr(layout.KIND)
_SOURCE_DTYPE = tl.constexpr(layout.SOURCE_DTYPE)
_DESTINATION_DTYPE = tl.constexpr(layout.DESTINATION_DTYPE)
_WIDTH = tl.constexpr(layout.WIDTH)
_TILE_MIDDLE = tl.constexpr(layout.TILE_MIDDLE)
_TILE_INNER = tl.constexpr(layout.TILE_INNER)
_TILES_MIDDLE = tl.constexpr(layout.TILES_MIDDLE)
_TILES_INNER = tl.constexpr(layout.TILES_INNER)
_NUM_COLUMNS = tl.constexpr(layout.NUM_COLUMNS)
_NUM_INT32_COLUMNS = tl.constexpr(2 * layout.NUM_COLUMNS)
_OUTER = tl.constexpr(layout.OUTER)
_MIDDLE = tl.constexpr(layout.MIDDLE)
_INNER = tl.constexpr(layout.INNER)
_COPY = tl.constexpr(layout.COPY)
_TRANSPOSE = tl.constexpr(layout.TRANSPOSE)
_BF16 = tl.constexpr(DTYPES.index(torch.bfloat16))
_F16 = tl.constexpr(DTYPES.index(torch.float16))
_F32 = tl.constexpr(DTYPES.index(torch.float32))


@triton.jit
def _bfloat16_of(bits, nan):
    """The upper half of fp32 bits, rounded to even."""
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, nan, rounded)


@triton.jit
def _float16_of(bits):
    """fp16 bits of fp32 bits, rounded to even; NaN is made quiet and keeps its payload."""
    sign = (bits >> 16) & 0x8000
    magnitude = bits & 0x7FFFFFFF
    # Next to 0.5 a float counts in units of 2^-24, as a subnormal half does.
    small = (magnitude.to(tl.float32, bitcast=True) + 0.5).to(tl.uint32, bitcast=True) - 0x3F000000
    normal = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13
    nan = 0x7E00 | ((magnitude >> 13) & 0x3FF)
    half = tl.where(magnitude < 0x477FF000, normal, 0x7C00)
    half = tl.where(magnitude < 0x38800000, small, half)
    return sign | tl.where(magnitude > 0x7F800000, nan, half)


@triton.jit
def _float32_of_half(bits):
    """fp32 bits of fp16 bits."""
    sign = (bits & 0x8000) << 16
    magnitude = bits & 0x7FFF
    # A subnormal is a whole number of 2^-24, which a float holds exactly.
    small = (magnitude.to(tl.float32) * 5.960464477539063e-08).to(tl.uint32, bitcast=True)
    wide = tl.where(magnitude < 0x400, small, (magnitude << 13) + 0x38000000)
    wide = tl.where(magnitude >= 0x7C00, (magnitude << 13) | 0x7F800000, wide)
    return sign | tl.where(magnitude > 0x7C00, wide | 0x400000, wide)


@triton.jit
def _convert(bits, source_dtype, destination_dtype):
    """Elements of two or four bytes, as the low bits of uint32, from one dtype to another."""
    result = bits
    if source_dtype != destination_dtype:
        wide = bits
        if source_dtype == _BF16:
            wide = bits << 16
        elif source_dtype == _F16:
            wide = _float32_of_half(bits)
        result = wide
        if destination_dtype == _BF16:
            # torch has a NaN of its own for this pair.
            result = _bfloat16_of(wide, tl.where(source_dtype == _F16, 0x7FC0, 0xFFFF))
        elif destination_dtype == _F16:
            result = _float16_of(wide)
    return result


@triton.jit
def _load(address, itemsize, is_aligned, mask):
    """Elements of two or four bytes, as uint32."""
    bits = tl.zeros(address.shape, tl.uint32)
    if is_aligned:
        if itemsize == 2:
            bits = tl.load(address.to(tl.pointer_type(tl.uint16)), mask=mask, other=0).to(tl.uint32)
        else:
            bits = tl.load(address.to(tl.pointer_type(tl.uint32)), mask=mask, other=0)
    else:
        for byte in tl.static_range(4):
            pointer = (address + byte).to(tl.pointer_type(tl.uint8))
            value = tl.load(pointer, mask=tl.where(byte < itemsize, mask, False), other=0)
            bits |= value.to(tl.uint32) << (8 * byte)
    return bits


@triton.jit
def _store(address, bits, itemsize, is_aligned, mask):
    if is_aligned:
        if itemsize == 2:
            tl.store(address.to(tl.pointer_type(tl.uint16)), bits.to(tl.uint16), mask=mask)
        else:
            tl.store(address.to(tl.pointer_type(tl.uint32)), bits, mask=mask)
    else:
        for byte in tl.static_range(4):
            pointer = (address + byte).to(tl.pointer_type(tl.uint8))
            value = ((bits >> (8 * byte)) & 0xFF).to(tl.uint8)
            tl.store(pointer, value, mask=tl.where(byte < itemsize, mask, False))


@triton.jit
def _copy_rows(
    source,
    destination,
    source_stride,
    destination_stride,
    rows,
    columns,
    is_fill,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bytes in units: several rows are made of whole ones, a single one may begin and end apart."""
    head = tl.minimum((SIZE - destination % SIZE) % SIZE, columns).to(tl.int32)
    per_row = (columns - head) // SIZE
    total = per_row * rows
    for start in tl.range(0, total, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < total
        row = at // per_row
        column = head + (at - row * per_row) * SIZE
        row = row.to(tl.int64)
        pointer = (source + row * source_stride + column).to(tl.pointer_type(UNIT))
        value = tl.load(pointer, mask=at < tl.where(is_fill == 0, total, 0), other=0)
        pointer = (destination + row * destination_stride + column).to(tl.pointer_type(UNIT))
        tl.store(pointer, value, mask=mask)
    if SIZE > 1:
        edge = tl.arange(0, 2 * SIZE)
        at = tl.where(edge < SIZE, edge, head + per_row * SIZE + edge - SIZE)
        end = tl.where(edge < SIZE, head, columns)
        end = tl.where(rows == 1, end, 0)
        pointer = (source + at).to(tl.pointer_type(tl.uint8))
        value = tl.load(pointer, mask=at < tl.where(is_fill == 0, end, 0), other=0)
        tl.store((destination + at).to(tl.pointer_type(tl.uint8)), value, mask=at < end)


@triton.jit
def _itemsize(dtype):
    """Bytes of an element by the dtype's code."""
    is_half = (dtype == _BF16) | (dtype == _F16)
    return tl.where(is_half, 2, tl.where(dtype == _F32, 4, 8))


@triton.jit(do_not_specialize=["num_items"])
def _pack_kernel(
    items_ptr,
    fields_ptr,
    num_items,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    MIDDLE: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    low = tl.zeros((), tl.int32)
    high = low + (num_items - 1)
    while low < high:
        middle = (low + high + 1) // 2
        first_tile = tl.load(items_ptr + middle.to(tl.int64) * _NUM_COLUMNS + _FIRST_TILE)
        is_behind = first_tile <= tile
        low, high = tl.where(is_behind, middle, low), tl.where(is_behind, high, middle - 1)

    item = items_ptr + low.to(tl.int64) * _NUM_COLUMNS
    fields = fields_ptr + low.to(tl.int64) * _NUM_INT32_COLUMNS
    source = tl.load(item + _SOURCE)
    destination = tl.load(item + _DESTINATION)
    source_stride = tl.load(item + _SOURCE_STRIDES + _MIDDLE)
    source_step = tl.load(item + _SOURCE_STRIDES + _INNER)
    destination_stride = tl.load(item + _DESTINATION_STRIDES + _MIDDLE)
    destination_step = tl.load(item + _DESTINATION_STRIDES + _INNER)
    kind = tl.load(fields + _KIND)
    source_dtype = tl.load(fields + _SOURCE_DTYPE)
    destination_dtype = tl.load(fields + _DESTINATION_DTYPE)
    width = tl.load(fields + _WIDTH)
    tile_middle = tl.load(fields + _TILE_MIDDLE).to(tl.int64)
    tile_inner = tl.load(fields + _TILE_INNER).to(tl.int64)
    tiles_middle = tl.load(fields + _TILES_MIDDLE)
    tiles_inner = tl.load(fields + _TILES_INNER)

    number = (tile - tl.load(item + _FIRST_TILE)).to(tl.int32)
    line = number // tiles_inner
    outer = (line // tiles_middle).to(tl.int64)
    first_row = (line % tiles_middle) * tile_middle
    first_column = (number % tiles_inner) * tile_inner
    rows = tl.minimum(tl.load(item + _SIZES + _MIDDLE) - first_row, tile_middle).to(tl.int32)
    columns = tl.minimum(tl.load(item + _SIZES + _INNER) - first_column, tile_inner).to(tl.int32)
    is_fill = (source == 0).to(tl.int32)
    source += outer * tl.load(item + _SOURCE_STRIDES + _OUTER) + first_row * source_stride
    source += first_column * source_step
    destination += outer * tl.load(item + _DESTINATION_STRIDES + _OUTER)
    destination += first_row * destination_stride + first_column * destination_step
    source_item = _itemsize(source_dtype)
    item_size = _itemsize(destination_dtype)
    is_aligned = width != 0

    if kind <= _COPY:  # zeros, or rows that are contiguous on both sides
        if width >= 8:
            _copy_rows(
                source, destination, source_stride, destination_stride, rows, columns, is_fill,
                tl.uint64, 8, BLOCK,
            )  # fmt: skip
        elif width == 4:
            _copy_rows(
                source, destination, source_stride, destination_stride, rows, columns, is_fill,
                tl.uint32, 4, BLOCK,
            )  # fmt: skip
        elif width == 2:
            _copy_rows(
                source, destination, source_stride, destination_stride, rows, columns, is_fill,
                tl.uint16, 2, BLOCK,
            )  # fmt: skip
        else:
            _copy_rows(
                source, destination, source_stride, destination_stride, rows, columns, is_fill,
                tl.uint8, 1, BLOCK,
            )  # fmt: skip
    elif (kind == _TRANSPOSE) & (item_size < 8):  # transposed
        inner = tl.arange(0, INNER)
        for start in tl.range(0, rows, MIDDLE):
            middle = start + tl.arange(0, MIDDLE)
            mask = (inner < columns)[:, None] & (middle < rows)[None, :]
            address = source + inner[:, None] * source_step + middle[None, :] * source_item
            bits = _load(address, source_item, True, mask)
            bits = tl.trans(_convert(bits, source_dtype, destination_dtype))
            mask = (middle < rows)[:, None] & (inner < columns)[None, :]
            address = (
                destination + middle[:, None] * destination_stride + inner[None, :] * item_size
            )
            _store(address, bits, item_size, True, mask)
    else:  # element by element; those of eight bytes, which are never cast, as two halves
        parts = tl.where(item_size == 8, 2, 1)
        total = rows * columns * parts
        for start in tl.range(0, total, BLOCK):
            at = start + tl.arange(0, BLOCK)
            mask = at < total
            element = at // parts
            half = (at % parts) * 4
            row = element // columns
            column = (element - row * columns).to(tl.int64)
            row = row.to(tl.int64)
            address = source + row * source_stride + column * source_step + half
            bits = _load(
                address,
                tl.minimum(source_item, 4),
                is_aligned,
                at < tl.where(is_fill == 0, total, 0),
            )
            bits = _convert(bits, source_dtype, destination_dtype)
            bits = tl.where(is_fill != 0, 0, bits)
            address = destination + row * destination_stride + column * destination_step + half
            _store(address, bits, tl.minimum(item_size, 4), is_aligned, mask)


def launch(items: Tensor, num_tiles: int) -> None:
    """Carries out every tile of items (num_items, NUM_COLUMNS) int64, on the items' device."""
    blocks = _Blocks.chosen()
    on_grid(_pack_kernel, (num_tiles,))(
        items,
        items.view(torch.int32),
        items.shape[0],
        BLOCK=blocks.block,
        INNER=_BLOCK_INNER,
        MIDDLE=blocks.middle,
        num_warps=blocks.num_warps,
    )
