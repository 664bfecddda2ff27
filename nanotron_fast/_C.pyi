"""The native engine. nanotron_fast/moves/engine.py is the way to call it."""

from array import array
from collections.abc import Sequence
from typing import Any

NUM_COLUMNS: int
FILL: int
NUM_SCALE_COLUMNS: int
UNSCALED: int
# Where a row of a table, and an item of a launch, have what.
COLUMNS: dict[str, int]
TILE_COLUMNS: dict[str, int]

class Progress:
    def __init__(self) -> None: ...
    @property
    def bytes_done(self) -> int: ...
    # Outputs by their places, and the digests of their ranges.
    def take_finished(self) -> list[tuple[int, list[bytes]]]: ...
    def cancel(self) -> None: ...

def execute(
    sources: Sequence[tuple[str | bytes, tuple[int, int, int, int] | None]],
    root: tuple[int, str | bytes],
    outputs: Sequence[tuple[str | bytes, Sequence[tuple[int, bytes]], int]],
    moves: array[int],
    *,
    workers: int,
    fsync: bool,
    progress: Progress,
    io: str = "buffered",
    hashed: Sequence[Sequence[tuple[int, int]]] = (),
    there: Sequence[int] = (),  # outputs, by their places, that are not created but opened
    scales: array[int] | None = None,
) -> str: ...
def compare(
    sources: Sequence[str | bytes],
    destinations: Sequence[str | bytes],
    moves: array[int],
    *,
    workers: int,
    progress: Progress,
    scales: array[int] | None = None,
) -> list[tuple[int, int, int]]: ...
def worker_buffer_bytes(
    moves: array[int],
    *,
    io: str = "buffered",
    compares: bool = False,
    scales: array[int] | None = None,
) -> int: ...

# ranges: (file, offset, size in bytes); a digest of 32 bytes for each.
def digest(
    files: Sequence[tuple[str | bytes, tuple[int, int, int, int] | None]],
    ranges: Sequence[tuple[int, int, int]],
    *,
    workers: int,
    progress: Progress,
    io: str = "buffered",
) -> list[bytes]: ...
def sha256(data: bytes, *, level: str = "") -> bytes: ...
def sha256_levels() -> list[str]: ...

# For tests alone: csrc/core/failure_point.h says what a failure looks like.
def set_failure_point(failure: str) -> None: ...
def failure_point_calls() -> int: ...
def pack(
    moves: array[int],
    sources: Sequence[tuple[int, int]],
    destinations: Sequence[tuple[int, int]],
    *,
    workers: int,
) -> None: ...
def pack_tiles(
    moves: array[int],
    sources: Sequence[tuple[int, int]],
    destinations: Sequence[tuple[int, int]],
) -> tuple[bytes, int]: ...
def read_ranges(
    paths: Sequence[str | bytes],
    moves: array[int],
    destinations: Sequence[tuple[int, int]],
    *,
    workers: int,
    scales: array[int] | None = None,
) -> int: ...

# weights are float64, taken and places int64, choices uint16; the last three are written to.
def blend(
    weights: Any,
    taken: Any,
    *,
    first: int,
    count: int,
    choices: Any = None,
    places: Any = None,
) -> None: ...
def cast(source: bytes, source_dtype: int, destination_dtype: int, *, simd: str = "") -> bytes: ...

# Codes of one scale, by the code of the byte's type, to values.
def dequantise(
    codes: bytes, code: int, destination_dtype: int, scale: float, *, simd: str = ""
) -> bytes: ...
def simd_levels() -> list[str]: ...
