"""One move, and the table of many that the engines take."""

from __future__ import annotations

import array
from collections.abc import Iterable
from dataclasses import dataclass

from nanotron_fast.moves.boxes import Box
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.row import columns_of


@dataclass(frozen=True, slots=True)
class Move:
    """One 3-D strided copy between files. Offsets in bytes; sizes and strides in elements.

    A source of `row.FILL` writes zeros.
    """

    source: int
    source_offset: int
    destination: int
    destination_offset: int
    sizes: Box
    source_strides: Box
    destination_strides: Box
    source_dtype: Dtype
    destination_dtype: Dtype

    @property
    def num_elements(self) -> int:
        a, b, c = self.sizes
        return a * b * c


def table_of(moves: Iterable[Move]) -> array.array[int]:
    """The moves as the engine takes them: int64, NUM_COLUMNS to a row."""
    table = array.array("q")
    for move in moves:
        table.extend(columns_of(move))
    return table
