"""One move, and the table of many that the engines take."""

from __future__ import annotations

import array
from collections.abc import Iterable
from dataclasses import dataclass

from nanotron_fast.moves.boxes import Box
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.row import UNSCALED, columns_of
from nanotron_fast.moves.scales import Code, Scales


@dataclass(frozen=True, slots=True)
class Move:
    """One 3-D strided copy between files. Offsets in bytes; sizes and strides in elements.

    A source of `row.FILL` writes zeros. One of a `Code` is quantised: each element is the value of
    its code times its scale, which `scales` finds.
    """

    source: int
    source_offset: int
    destination: int
    destination_offset: int
    sizes: Box
    source_strides: Box
    destination_strides: Box
    source_dtype: Dtype | Code
    destination_dtype: Dtype
    scales: Scales | None = None

    @property
    def num_elements(self) -> int:
        a, b, c = self.sizes
        return a * b * c

    @property
    def source_span(self) -> int:
        """Elements of the source from the first that is read to the last, both included."""
        (a, b, c), (x, y, z) = self.sizes, self.source_strides
        return 1 + (a - 1) * x + (b - 1) * y + (c - 1) * z

    @property
    def scales_range(self) -> tuple[int, int]:
        """Where its scales begin and end, in bytes of their file. It must have some."""
        assert self.scales is not None
        first = self.source_offset - self.scales.codes_offset
        return self.scales.range_of(first, first + self.source_span - 1)


def table_of(moves: Iterable[Move]) -> array.array[int]:
    """The moves as the engine takes them: int64, NUM_COLUMNS to a row."""
    table = array.array("q")
    numbers: dict[Scales, int] = {}
    for move in moves:
        scales = UNSCALED
        if move.scales is not None:
            scales = numbers.setdefault(move.scales, len(numbers))
        table.extend(columns_of(move, scales))
    return table


def scales_of(moves: Iterable[Move]) -> array.array[int]:
    """The scales that moves need, as `table_of` numbers them: int64, NUM_SCALE_COLUMNS to a row."""
    table = array.array("q")
    for scales in dict.fromkeys(move.scales for move in moves if move.scales is not None):
        table.extend(scales)
    return table
