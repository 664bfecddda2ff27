"""The row of a move in the table that the engines read: what stands in which column.

A table is int64 and row-major. Offsets are in bytes, sizes and strides in elements; each of the
three has a column for each dimension of the box. Of a quantised source, SCALES is the row of its
scales in a second table (`moves/scales.py`). `csrc/core/move.h` names the same columns, and a test
holds the two to each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

SOURCE = 0
SOURCE_OFFSET = 1
DESTINATION = 2
DESTINATION_OFFSET = 3
SIZES = slice(4, 7)
SOURCE_STRIDES = slice(7, 10)
DESTINATION_STRIDES = slice(10, 13)
SOURCE_DTYPE = 13
DESTINATION_DTYPE = 14
SCALES = 15
NUM_COLUMNS = 16

# The source of a move that writes zeros.
FILL = -1
# Of a move whose source is not quantised.
UNSCALED = -1


class Row(NamedTuple):
    """The numbers of a row by their names, for whoever writes a table without Move objects."""

    source: int
    source_offset: int
    destination: int
    destination_offset: int
    sizes: tuple[int, int, int]
    source_strides: tuple[int, int, int]
    destination_strides: tuple[int, int, int]
    source_dtype: int
    destination_dtype: int


def columns_of(move: Any, scales: int = UNSCALED) -> tuple[int, ...]:
    """NUM_COLUMNS numbers, in the order of the table. `move` is a Move, or a Row.

    `scales` is the row that the scales of its source have in their table.
    """
    return (
        move.source,
        move.source_offset,
        move.destination,
        move.destination_offset,
        *move.sizes,
        *move.source_strides,
        *move.destination_strides,
        int(move.source_dtype),
        int(move.destination_dtype),
        scales,
    )
