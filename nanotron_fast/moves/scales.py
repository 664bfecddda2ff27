"""Quantised tensors: what their bytes stand for, and where the scale of each of them lies.

A code is a byte of a quantised tensor. The value of an element is its code's value times its
scale, taken in fp32 and rounded once to the dtype that is written. Scales lie in a tensor of their
own, one for each block of a matrix. Blocks at the right and the lower edge may be cut short, and
no block reaches from one matrix of a stack into the next. `csrc/core/scales.h` says the same.
"""

from __future__ import annotations

import enum
import math
from typing import NamedTuple


class Code(enum.IntEnum):
    """What a byte stands for; the value is the code that the native engine knows it by.

    E4M3 is a float of eight bits, without infinities. E2M1 is one of four bits, two to a byte: the
    engine takes the low ones and the high ones in moves of their own.
    """

    E4M3 = 4
    E2M1_LOW = 5
    E2M1_HIGH = 6

    @property
    def itemsize(self) -> int:
        """Bytes from one element that a move reads to its neighbour."""
        return 1

    @property
    def bits(self) -> int:
        """Of the byte, those that an element takes."""
        return 8 if self is Code.E4M3 else 4


class Quantised(enum.Enum):
    """The element type of a quantised tensor; the value is its name in messages."""

    E4M3 = "fp8"
    E2M1 = "mxfp4"

    @property
    def short_name(self) -> str:
        """As a report says it, where other dtypes are "bf16"."""
        return self.value


class ScaleDtype(enum.IntEnum):
    """How a scale is stored; the value is the code that the native engine knows it by.

    E8M0 is 2 ** (byte - 127), and NaN for 255, which in EXPONENT is infinite. MICRO is the exponent
    of a block of E2M1: its 255 is 2 ** 128, which no float holds, but products with it may.
    """

    F32 = 0
    BF16 = 1
    F16 = 2
    E8M0 = 3
    EXPONENT = 4
    MICRO = 5

    @property
    def itemsize(self) -> int:
        """Bytes a scale takes."""
        return 4 if self is ScaleDtype.F32 else 2 if self in (1, 2) else 1


class Scales(NamedTuple):
    """Where the scales of one tensor lie.

    Args:
        source: the file they are in, numbered as those of the codes.
        offset: of the first of them, in bytes.
        dtype: how each is stored.
        codes_offset: of the tensor's first code in its own file, in bytes.
        rows, columns: of each matrix, in bytes of codes.
        block_rows, block_columns: what one scale is for, in bytes of codes.
    """

    source: int
    offset: int
    dtype: ScaleDtype
    codes_offset: int
    rows: int
    columns: int
    block_rows: int
    block_columns: int

    @property
    def grid_columns(self) -> int:
        """Scales beside each other."""
        return -(-self.columns // self.block_columns)

    def grid_row(self, position: int) -> int:
        """The row of scales that a code has its own in, by the code's place in the tensor."""
        matrix, place = divmod(position, self.rows * self.columns)
        rows_of_matrix = -(-self.rows // self.block_rows)
        return matrix * rows_of_matrix + place // self.columns // self.block_rows

    def range_of(self, first: int, last: int) -> tuple[int, int]:
        """The bytes of the rows of scales that codes from `first` to `last` have theirs in."""
        row_bytes = self.grid_columns * self.dtype.itemsize
        return (
            self.offset + self.grid_row(first) * row_bytes,
            self.offset + (self.grid_row(last) + 1) * row_bytes,
        )


# The columns of a row of the table of scales, in order: those of `Scales`.
NUM_SCALE_COLUMNS = len(Scales._fields)


def value_of(code: Code, byte: int) -> float:
    """What a byte stands for, before it is scaled. Of E2M1 it is twice that, as of MICRO half."""
    if code is Code.E4M3:
        sign, exponent, fraction = byte >> 7, byte >> 3 & 15, byte & 7
        if byte & 0x7F == 0x7F:
            return math.nan
        size = math.ldexp(fraction + 8 * bool(exponent), max(exponent, 1) - 10)
        return -size if sign else size
    nibble = byte & 15 if code is Code.E2M1_LOW else byte >> 4
    exponent, fraction = nibble >> 1 & 3, nibble & 1
    size = math.ldexp(fraction + 2 * bool(exponent), max(exponent, 1) - 1)
    return -size if nibble >> 3 else size
