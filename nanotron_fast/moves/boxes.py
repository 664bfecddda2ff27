"""Boxes of up to three dimensions, which moves copy."""

from __future__ import annotations

Box = tuple[int, int, int]


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a C-contiguous tensor."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)
