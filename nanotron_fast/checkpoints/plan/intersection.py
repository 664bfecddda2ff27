"""The moves between two sides: every byte that a conversion moves, known before the first is moved.

Each side can say where a part of a parameter lies in its files. Each place on one side is
intersected with each place on the other, and what they share is one move.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from nanotron_fast.families.parts import Param, Part
from nanotron_fast.moves.move import Move
from nanotron_fast.moves.pieces import Piece, fill_behind, moves_between


class Side(Protocol):
    """The tensors of a checkpoint, to read from or to write to."""

    def pieces(self, param: Param, part: Part) -> list[Piece]:
        """Where a part lies. Raises CheckpointError where it should be and is not."""
        ...


@dataclass(frozen=True, slots=True)
class NamedMove:
    """A move and the tensor that it serves: for messages."""

    move: Move
    hf_name: str


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
            name = part.name
            places = source.pieces(source_param, source_part)
            for piece in destination.pieces(param, part):
                for place in places:
                    for move in moves_between(place, piece):
                        yield NamedMove(move, name)
                padding = _padding(part, places, piece)
                if padding is not None:
                    yield NamedMove(padding, name)


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
                    yield NamedMove(padding, part.name)


def _padding(part: Part, places: Sequence[Piece], piece: Piece) -> Move | None:
    """Rows of a destination that no source has, as a fill. They are vocabulary padding."""
    if part.unpadded_rows is None:
        return None
    return fill_behind(piece, max(place.high[0] for place in places))
