"""What a checkpoint holds more than once: the comparisons that prove that all of it is the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from nanotron_fast.checkpoints.plan.intersection import NamedMove
from nanotron_fast.families.parts import Param, Part, Sizes
from nanotron_fast.moves.pieces import Piece, intersect


class MustBeEqual(NamedTuple):
    """A move that would write one of two equal things over the other: comparing shows differences.

    Args:
        differ: that they differ, as a message says it.
        where: which two they are, where the tensor's name does not say that.
        advice: what to do then.
    """

    named: NamedMove
    differ: str
    where: str = ""
    advice: str = ""


def of_kv_heads(
    param: Param,
    part: Part,
    shares: Iterable[tuple[Sizes, Piece]],
    sizes: Sizes,
    *,
    what: str = "",
) -> Iterator[MustBeEqual]:
    """The copies of key-value heads that tensor-parallel ranks have, beside the first of each.

    Args:
        shares: ranks in their order, and a piece of what each has; one that has several comes
            several times, and the ranks with its copies as often.
        what: which states of the parameter; none for its weights.
    """
    of_what = f"{what} of {param.name}" if what else param.name
    firsts: dict[int, list[Piece]] = {}
    copies: dict[int, list[Piece]] = {}
    for ranks, piece in shares:
        copy = param.copy_of(part, sizes, ranks)
        (copies if copy else firsts).setdefault(ranks["tp"], []).append(piece)
    for rank, pieces in copies.items():
        first = rank - param.copy_of(part, sizes, {"tp": rank})
        where = f"ranks {first} and {rank} of TP={sizes['tp']}"
        for one, other in zip(firsts[first], pieces, strict=True):
            move = intersect(one, other)
            assert move is not None  # they are cut alike
            yield MustBeEqual(
                NamedMove(move, part.name),
                f"{where} have copies of one key-value head of {of_what}, which differ",
                where,
                "They were equal when they were written; convert the checkpoint from its source "
                "again, or go back to an earlier one",
            )
