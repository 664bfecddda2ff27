"""Whole numbers of launches. Triton's own functions for them take as long as half a launch."""

from __future__ import annotations


def ceil_div(size: int, block: int) -> int:
    """How many blocks cover a size."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The least power of two that is not below a size of 1 or more; 1 for a size of 0."""
    return 1 << max(size - 1, 0).bit_length()


def unit_of(*sizes: int) -> int:
    """The largest of 8, 4, 2 and 1 that divides all sizes and strides of a launch.

    A kernel is given them in this unit, which it is compiled for, and multiplies them: so it makes
    vectors of as many elements. Of a size itself Triton sees no smaller factor than 16, and without
    one reads element by element. Where one takes more than 31 bits it is 1, for such a size is 64
    bits wide then, and its product too; one that is divided would be multiplied as 32 bits.
    """
    combined = 8
    for size in sizes:
        combined |= size
    return 1 if combined >> 31 else combined & -combined
