"""The row of a move: what Python, C++ and the Move say of its columns is one thing."""

from __future__ import annotations

import pytest

from nanotron_fast.moves import row
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.move import Move, table_of

_C = pytest.importorskip("nanotron_fast._C", reason="the native code is not built")

FIELDS = {name: value for name, value in vars(row).items() if name.isupper()}
NUM_COLUMNS, FILL = FIELDS.pop("NUM_COLUMNS"), FIELDS.pop("FILL")
UNSCALED = FIELDS.pop("UNSCALED")


def first_of(columns: int | slice) -> int:
    return columns.start if isinstance(columns, slice) else columns


def test_the_engine_names_the_same_columns() -> None:
    assert {name: first_of(columns) for name, columns in FIELDS.items()} == _C.COLUMNS
    assert (NUM_COLUMNS, FILL, UNSCALED) == (_C.NUM_COLUMNS, _C.FILL, _C.UNSCALED)
    for columns in FIELDS.values():
        if isinstance(columns, slice):
            assert columns.stop - columns.start == 3


def test_a_move_stands_in_the_columns_that_are_named_for_it() -> None:
    plain = row.Row(10, 11, 12, 13, (14, 15, 16), (17, 18, 19), (20, 21, 22), 2, 1)
    move = Move(**{**plain._asdict(), "source_dtype": Dtype.F32, "destination_dtype": Dtype.F16})
    table = table_of([move])
    assert len(table) == NUM_COLUMNS
    assert tuple(table) == row.columns_of(plain)
    assert table[row.SCALES] == UNSCALED
    for name, columns in FIELDS.items():
        if name == "SCALES":
            continue
        wanted = getattr(move, name.lower())
        assert (tuple(table[columns]) if isinstance(columns, slice) else table[columns]) == wanted
