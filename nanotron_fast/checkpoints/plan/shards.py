"""From the shards of a tensor that are stored to the shards that are wanted, as moves.

A share says by pairs of slices which boxes of the whole tensor it holds. With ZeRO-1 a rank keeps a
run of its flattened shard, and a run is a few boxes. What a stored box and a wanted box have in
common is one move. Whose tensors they are makes no difference here: weights, the states of an
optimizer, those in files and those in memory are planned alike.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from nanotron_fast.errors import CheckpointError, UnmovableError
from nanotron_fast.formats.nanotron.slices import SlicesPair
from nanotron_fast.moves.boxes import (
    Bounds,
    Box,
    are_disjoint,
    boxes_of_run,
    num_covered,
    row_major,
)
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.move import Move
from nanotron_fast.moves.pieces import Piece, common_box, fill_behind, intersect
from nanotron_fast.moves.row import FILL

_NUM_DIMS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a rank has of a tensor, or shall have, and where: its elements in C order, without gaps.

    Attributes:
        name: what messages call it: the path of its file, or the name of a tensor in memory.
        file: the number of its file among the sources or the destinations of a plan.
        offset_bytes: where its first element lies in the file.
        shape: the shape of the rank's shard.
        pairs: which slices of the shard are which of the whole tensor.
        whole_shape: the shape of the whole tensor.
        run: the first element of the flattened shard that the share has, and the one behind its
            last; None where it has them all.
    """

    name: str
    file: int
    offset_bytes: int
    dtype: Dtype
    shape: tuple[int, ...]
    pairs: Sequence[SlicesPair]
    whole_shape: tuple[int, ...]
    run: tuple[int, int] | None = None

    @property
    def num_elements(self) -> int:
        first, end = self._bounds
        return end - first

    @property
    def _bounds(self) -> tuple[int, int]:
        return (0, math.prod(self.shape)) if self.run is None else self.run

    def pieces(self) -> list[Piece]:
        """The share as boxes of the whole tensor, each with its place in the file.

        Raises:
            CheckpointError: the slices do not fit the shapes, or the run is not in the shard.
            UnmovableError: the slices have steps, or the tensor has more than three dimensions.
        """
        if len(self.shape) > _NUM_DIMS:
            raise UnmovableError(f"{self.name} has {len(self.shape)} dimensions")
        first, end = self._bounds
        if not 0 <= first <= end <= math.prod(self.shape):
            raise CheckpointError(
                f"{self.name}: elements {first} to {end} of a shard of {list(self.shape)}, which "
                f"has {math.prod(self.shape)}"
            )
        strides = row_major(self.shape)
        boxes = boxes_of_run(self.shape, first, end)
        pieces: list[Piece] = []
        for pair in self.pairs:
            region = pair.region(self.name, self.shape, self.whole_shape)
            region_end = [at + size for at, size in zip(region.local, region.sizes, strict=True)]
            for box in boxes:
                low = list(map(max, box.low, region.local))
                high = list(map(min, box.high, region_end))
                if any(a >= b for a, b in zip(low, high, strict=True)):
                    continue
                element = sum(index * stride for index, stride in zip(low, strides, strict=True))
                shift = [b - a for a, b in zip(region.local, region.whole, strict=True)]
                pieces.append(
                    Piece(
                        file=self.file,
                        offset_bytes=self.offset_bytes + (element - first) * self.dtype.itemsize,
                        dtype=self.dtype,
                        low=_box([a + by for a, by in zip(low, shift, strict=True)], 0),
                        high=_box([b + by for b, by in zip(high, shift, strict=True)], 1),
                        strides=_box(strides, 1),
                    )
                )
        return pieces


def _box(values: Sequence[int], rest: int) -> Box:
    """Three values of a tensor that has as many dimensions or fewer."""
    a, b, c = (*values, *(rest for _ in range(_NUM_DIMS - len(values))))
    return a, b, c


def plan_shards(
    stored: Sequence[Share],
    wanted: Sequence[Share],
    *,
    place: str,
    stored_rows: int | None = None,
) -> list[Move]:
    """The moves that fill the wanted shares of one tensor, each of them whole.

    Args:
        stored: all that there is of the tensor; what nobody wants of it is not moved.
        wanted: shares that are filled from nothing else.
        place: where those that are stored lie, for messages: a folder.
        stored_rows: rows of the whole tensor that were stored; those behind them are zeros. None
            where all were.

    Raises:
        CheckpointError: shares contradict each other or themselves, or some are missing.
        UnmovableError: stored shares overlap, slices have steps or do not make up what is wanted,
            a tensor has more than three dimensions, or fp64 would be cast.
    """
    if not wanted:
        return []
    destinations = [(share, share.pieces()) for share in wanted]
    for share, pieces in destinations:
        if sum(map(_num_elements, pieces)) != share.num_elements:
            raise UnmovableError(f"the slices of {share.name} do not make it up")
    for share in (*stored, *wanted):
        _check_same_tensor(share, wanted[0])
    sources = _Pieces(piece for share in stored for piece in share.pieces())
    moves: list[Move] = []
    for share, pieces in destinations:
        found = held = 0
        for piece in pieces:
            boxes: list[Bounds] = []
            for source in sources.near(piece):
                move, box = intersect(source, piece), common_box(source, piece)
                if move is not None and box is not None:
                    moves.append(move)
                    boxes.append(Bounds(*box))
            in_boxes = sum(box.num_elements for box in boxes)
            found += in_boxes
            held += in_boxes if are_disjoint(boxes) else num_covered(boxes)
            padding = None if stored_rows is None else fill_behind(piece, stored_rows)
            if padding is not None:
                moves.append(padding)
                found += padding.num_elements
                held += padding.num_elements
        if held < share.num_elements:
            raise CheckpointError(
                f"{share.name}: the {len(stored)} shards in {place} hold {held} of the "
                f"{share.num_elements} elements that this rank needs; some are missing"
            )
        if held < found:
            raise UnmovableError(f"the shards in {place} overlap")
    return moves


class ShardPlanner:
    """Plans the shards of many tensors, as `plan_shards` does.

    The layers of a model are alike: tensors that are shared out in the same way, from and to as
    many files, are planned once, and the moves of the others differ in files and offsets alone.
    """

    def __init__(self) -> None:
        # With the shares that each was planned for, whose slices a key knows by where they are.
        self._planned: dict[Hashable, tuple[Sequence[Share], Sequence[Share], list[Move]]] = {}

    def plan(
        self,
        stored: Sequence[Share],
        wanted: Sequence[Share],
        *,
        place: str,
        stored_rows: int | None = None,
    ) -> list[Move]:
        """As `plan_shards`."""
        key = tuple(map(_form, stored)), tuple(map(_form, wanted)), stored_rows
        if key not in self._planned:
            moves = plan_shards(
                _numbered(stored), _numbered(wanted), place=place, stored_rows=stored_rows
            )
            self._planned[key] = stored, wanted, moves
        return [_placed(move, stored, wanted) for move in self._planned[key][2]]


def _form(share: Share) -> Hashable:
    """All that a share's moves depend on, but for its file and where it lies in that."""
    return id(share.pairs), share.shape, share.whole_shape, share.run, share.dtype


def _numbered(shares: Sequence[Share]) -> list[Share]:
    """Shares that begin their files, which are numbered as the shares are."""
    return [replace(share, file=n, offset_bytes=0) for n, share in enumerate(shares)]


def _placed(move: Move, stored: Sequence[Share], wanted: Sequence[Share]) -> Move:
    """A move of shares that are numbered, in their files."""
    source, source_offset = move.source, move.source_offset
    if source != FILL:
        share = stored[source]
        source, source_offset = share.file, share.offset_bytes + source_offset
    target = wanted[move.destination]
    return Move(
        source,
        source_offset,
        target.file,
        target.offset_bytes + move.destination_offset,
        move.sizes,
        move.source_strides,
        move.destination_strides,
        move.source_dtype,
        move.destination_dtype,
    )


def _check_same_tensor(share: Share, other: Share) -> None:
    if share.whole_shape != other.whole_shape:
        raise CheckpointError(
            f"{share.name}: it is a shard of a tensor of {list(share.whole_shape)}, and "
            f"{other.name} of {list(other.whole_shape)}"
        )
    if share.dtype is not other.dtype and Dtype.F64 in (share.dtype, other.dtype):
        raise UnmovableError(
            f"{other.name} is {other.dtype.name}, and {share.dtype.name} in {share.name}"
        )


class _Pieces:
    """Pieces of one tensor, in order of their first rows: those near another are found at once."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces = sorted(pieces, key=lambda piece: piece.low[0])
        self._first_rows = [piece.low[0] for piece in self._pieces]
        self._most_rows = max((piece.high[0] - piece.low[0] for piece in self._pieces), default=0)

    def near(self, piece: Piece) -> Sequence[Piece]:
        """All that have rows in common with a piece, and some others."""
        first = bisect_right(self._first_rows, piece.low[0] - self._most_rows)
        return self._pieces[first : bisect_left(self._first_rows, piece.high[0])]


def _num_elements(piece: Piece) -> int:
    return Bounds(piece.low, piece.high).num_elements
