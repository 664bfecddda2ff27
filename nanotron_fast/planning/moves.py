"""A plan: every byte that a conversion moves, known before the first is moved.

Two sides, each of which can say where a part of a parameter lies in its files, make a plan: each
place on one side is intersected with each place on the other, and what they share is one move.
"""

from __future__ import annotations

import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from nanotron_fast.dtypes import Dtype
from nanotron_fast.errors import PlanError
from nanotron_fast.families.parts import Box, Param, Part
from nanotron_fast.planning.coverage import Extent, cover, extent_of

FILL = -1
NUM_COLUMNS = 15


@dataclass(frozen=True, slots=True)
class Move:
    """One 3-D strided copy between files. Offsets in bytes; sizes and strides in elements.

    A source of FILL writes zeros.
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


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A safetensors file to be written: path relative to the destination, header, whole size."""

    path: str
    header: bytes
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """The share of a part that one file holds: a box of it, and where its first element lies."""

    file: int
    offset_bytes: int
    dtype: Dtype
    low: Box
    high: Box
    strides: Box


class Side(Protocol):
    """The tensors of a checkpoint, to read from or to write to."""

    def pieces(self, param: Param, part: Part) -> list[Piece]:
        """Where a part lies. Raises CheckpointError where it should be and is not."""
        ...


@dataclass(frozen=True, slots=True)
class NamedMove:
    """A move and the tensors it serves: for messages."""

    move: Move
    hf_name: str
    param: str


def plan_moves(
    params: Sequence[Param],
    source: Side,
    destination: Side,
    *,
    source_params: Sequence[Param] | None = None,
) -> Iterator[NamedMove]:
    """The moves that make every part in the destination from the source.

    Vocabulary padding that the source lacks is filled with zeros. `source_params` are the same
    parameters as the source has them, where padding or the order of rotary rows differs.
    """
    for param, source_param in zip(params, source_params or params, strict=True):
        for part, source_part in zip(param.parts, source_param.parts, strict=True):
            name = part.hf[0].name
            places = source.pieces(source_param, source_part)
            for piece in destination.pieces(param, part):
                for place in places:
                    move = intersect(place, piece)
                    if move is not None:
                        yield NamedMove(move, name, param.name)
                padding = _padding(part, places, piece)
                if padding is not None:
                    yield NamedMove(padding, name, param.name)


def plan_padding(
    params: Sequence[Param], other_params: Sequence[Param], side: Side, other: Side
) -> Iterator[NamedMove]:
    """Fills of the rows that `side` has and `other` lacks: vocabulary padding, to compare."""
    for param, other_param in zip(params, other_params, strict=True):
        for part, other_part in zip(param.parts, other_param.parts, strict=True):
            places = other.pieces(other_param, other_part)
            for piece in side.pieces(param, part):
                padding = _padding(part, places, piece)
                if padding is not None:
                    yield NamedMove(padding, part.hf[0].name, param.name)


def intersect(source: Piece, destination: Piece) -> Move | None:
    """The move of what two pieces of one tensor share, or None."""
    low = (
        max(source.low[0], destination.low[0]),
        max(source.low[1], destination.low[1]),
        max(source.low[2], destination.low[2]),
    )
    sizes = (
        min(source.high[0], destination.high[0]) - low[0],
        min(source.high[1], destination.high[1]) - low[1],
        min(source.high[2], destination.high[2]) - low[2],
    )
    if min(sizes) <= 0:
        return None
    return Move(
        source.file,
        _offset(source, low),
        destination.file,
        _offset(destination, low),
        sizes,
        source.strides,
        destination.strides,
        source.dtype,
        destination.dtype,
    )


def _offset(piece: Piece, low: Box) -> int:
    elements = sum(
        (index - first) * stride
        for index, first, stride in zip(low, piece.low, piece.strides, strict=True)
    )
    return piece.offset_bytes + elements * piece.dtype.itemsize


def _padding(part: Part, places: Sequence[Piece], piece: Piece) -> Move | None:
    """Rows of a destination that no source has, as a fill. They are vocabulary padding."""
    end = max(place.high[0] for place in places)
    if part.hf_rows is None or piece.high[0] <= end:
        return None
    low = (max(piece.low[0], end), piece.low[1], piece.low[2])
    sizes = (piece.high[0] - low[0], piece.high[1] - low[1], piece.high[2] - low[2])
    return Move(
        FILL,
        0,
        piece.file,
        _offset(piece, low),
        sizes,
        (0, 0, 0),
        piece.strides,
        piece.dtype,
        piece.dtype,
    )


def table_of(moves: Iterable[Move]) -> array.array[int]:
    """The moves as the engine takes them: int64, NUM_COLUMNS to a row."""
    table = array.array("q")
    for move in moves:
        table.extend(
            (
                move.source,
                move.source_offset,
                move.destination,
                move.destination_offset,
                *move.sizes,
                *move.source_strides,
                *move.destination_strides,
                move.source_dtype,
                move.destination_dtype,
            )
        )
    return table


@dataclass(frozen=True, slots=True)
class MovePlan:
    """Files, and the moves between them."""

    sources: tuple[Path, ...]
    outputs: tuple[OutputFile, ...]
    moves: tuple[Move, ...]

    @property
    def bytes_read(self) -> int:
        """Bytes of source tensors that are copied."""
        return sum(
            move.num_elements * move.source_dtype.itemsize
            for move in self.moves
            if move.source != FILL
        )

    @property
    def bytes_written(self) -> int:
        """Bytes of all output files, headers included."""
        return sum(output.size_bytes for output in self.outputs)

    def check(self) -> None:
        """Proves that every byte of every output is written exactly once. Raises PlanError."""
        by_file: list[list[Extent]] = [[] for _ in self.outputs]
        for move in self.moves:
            if not 0 <= move.destination < len(self.outputs):
                raise PlanError(f"a move writes to file {move.destination} of {len(self.outputs)}")
            path = self.outputs[move.destination].path
            for size, stride in zip(move.sizes, move.destination_strides, strict=True):
                if size < 1 or (size > 1 and stride < 1):
                    raise PlanError(f"{path}: a move of size {size} and stride {stride}")
            by_file[move.destination].append(
                extent_of(
                    move.destination_offset,
                    move.destination_dtype.itemsize,
                    move.sizes,
                    move.destination_strides,
                )
            )
        for output, extents in zip(self.outputs, by_file, strict=True):
            extents.sort(key=lambda extent: extent.offset)
            start = len(output.header)
            left = cover(output.path, extents, start, output.size_bytes)
            if left:
                raise PlanError(
                    f"{output.path}: a move writes at byte {left[0].offset}, behind the end at "
                    f"{output.size_bytes}"
                )

    def share(self, rank: int, world_size: int) -> MovePlan:
        """What one of several processes does: whole folders of files, balanced by bytes.

        The shards of one parameter share a folder and are made from the same bytes, so they stay
        together. Every process computes the same shares.
        """
        if world_size == 1:
            return self
        folders: dict[str, int] = {}
        for output in self.outputs:
            key = _folder(output)
            folders[key] = folders.get(key, 0) + output.size_bytes
        loads = [0] * world_size
        owner: dict[str, int] = {}
        for key, size in sorted(folders.items(), key=lambda item: (-item[1], item[0])):
            owner[key] = loads.index(min(loads))
            loads[owner[key]] += size
        mine = [
            index for index, output in enumerate(self.outputs) if owner[_folder(output)] == rank
        ]
        renumbered = {old: new for new, old in enumerate(mine)}
        return MovePlan(
            self.sources,
            tuple(self.outputs[index] for index in mine),
            tuple(
                replace(move, destination=renumbered[move.destination])
                for move in self.moves
                if move.destination in renumbered
            ),
        )


def _folder(output: OutputFile) -> str:
    folder, _, name = output.path.rpartition("/")
    return folder or name
