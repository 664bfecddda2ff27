"""The row of a move in the table that the engines read: what stands in which column.

A table is int64 and row-major. Offsets are in bytes, sizes and strides in elements; each of the
three has a column for each dimension of the box. `csrc/core/move.h` reads the same row.
"""

from __future__ import annotations

SOURCE = 0
SOURCE_OFFSET = 1
DESTINATION = 2
DESTINATION_OFFSET = 3
SIZES = slice(4, 7)
SOURCE_STRIDES = slice(7, 10)
DESTINATION_STRIDES = slice(10, 13)
SOURCE_DTYPE = 13
DESTINATION_DTYPE = 14
NUM_COLUMNS = 15

# The source of a move that writes zeros.
FILL = -1
