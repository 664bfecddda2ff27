"""An item of a launch, which is one move as a device takes it: what stands in which column.

`csrc/core/tiles.h` says what each of them means, and a test holds the columns to it. The columns
down to FIRST_TILE count int64, the others int32 from the start of the item on.
"""

from __future__ import annotations

SOURCE = 0
DESTINATION = 1
# The first of three, for the dimensions of the box below.
SIZES = 2
SOURCE_STRIDES = 5
DESTINATION_STRIDES = 8
FIRST_TILE = 11

KIND = 24
SOURCE_DTYPE = 25
DESTINATION_DTYPE = 26
WIDTH = 27
TILE_MIDDLE = 28
TILE_INNER = 29
TILES_MIDDLE = 30
TILES_INNER = 31

# The size of an item in int64; in int32 it is twice that.
NUM_COLUMNS = 16

# Dimensions of the box.
OUTER, MIDDLE, INNER = range(3)
# Kinds.
FILL, COPY, CAST, TRANSPOSE, STRIDED = range(5)
