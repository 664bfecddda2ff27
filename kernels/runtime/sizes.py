"""Whole numbers of launches. Triton's own functions for them take as long as half a launch."""

from __future__ import annotations


def ceil_div(size: int, block: int) -> int:
    """How many blocks cover a size."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The least power of two that is not below a size of 1 or more; 1 for a size of 0."""
    return 1 << max(size - 1, 0).bit_length()
