"""How a dimension that is cut spreads over tensor-parallel ranks, and which ranks have copies.

Every chunk of it is split over the ranks by itself. Only of key-value heads there may be fewer than
ranks: then each goes to as many neighbouring ranks, which all have a copy. Of R ranks, rank r has
head r * num_heads // R.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Heads(NamedTuple):
    """The key-value heads of a chunk, where ranks beyond them have copies.

    `num_heads` is how many there are. The first `num_divided` rows of a head, those of its query
    heads, are shared out among the ranks that have it; the rows behind those are copied.
    """

    num_heads: int
    num_divided: int = 0

    def copies(self, size: int) -> int:
        """How many of `size` ranks have the same head: 1 where they do not outnumber the heads.

        It is 1 as well where they cannot have equally many copies of each.
        """
        return size // self.num_heads if size > self.num_heads and size % self.num_heads == 0 else 1


class Span(NamedTuple):
    """Neighbouring indices of a dimension, `length` many, that a rank's shard has.

    The first is `local` in the shard and `whole` in the whole tensor. `copies` neighbouring ranks
    have the same: those from a multiple of it on.
    """

    local: int
    whole: int
    length: int
    copies: int = 1


def local_length(length: int, heads: Heads | None, size: int) -> int:
    """Of a chunk of `length`, what each of `size` ranks has."""
    copies = 1 if heads is None else heads.copies(size)
    if heads is None or copies == 1:
        return length // size
    return heads.num_divided // copies + length // heads.num_heads - heads.num_divided


def has_copies(heads: Sequence[Heads | None], size: int) -> bool:
    """Whether some of `size` ranks have the same."""
    return any(each is not None and each.copies(size) > 1 for each in heads)


def spans_of(
    chunks: Sequence[int], heads: Sequence[Heads | None], *, size: int, rank: int
) -> tuple[Span, ...]:
    """What a rank's shard has of a dimension, in the order of the shard.

    Args:
        chunks: their lengths.
        heads: of each chunk; empty where none has any.
        size, rank: of the group.
    """
    spans: list[Span] = []
    local = start = 0
    for index, length in enumerate(chunks):
        of_chunk = heads[index] if heads else None
        copies = 1 if of_chunk is None else of_chunk.copies(size)
        if of_chunk is None or copies == 1:
            share = length // size
            found = [Span(local, start + rank * share, share)]
        else:
            head, copy = divmod(rank, copies)
            rows = length // of_chunk.num_heads
            first = start + head * rows
            divided = of_chunk.num_divided // copies
            found = [
                Span(local, first + copy * divided, divided),
                Span(
                    local + divided,
                    first + of_chunk.num_divided,
                    rows - of_chunk.num_divided,
                    copies,
                ),
            ]
        spans += [span for span in found if span.length]
        local += sum(span.length for span in found)
        start += length
    return tuple(spans)
