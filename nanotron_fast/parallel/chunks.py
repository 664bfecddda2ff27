"""How the rows that a group exchanges are cut, so that products run beside what travels.

A rank's rows are cut into chunks, and a chunk travels at a time: the same chunk of every rank's
rows. So what arrives lies chunk after chunk, and in each chunk rank after rank: an `Order`.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from nanotron_fast.kernels.runtime.collectives import Ranks

# Rows of the whole product, over all ranks (Flux and PyTorch's async TP lose below about as many).
MIN_ROWS = 2048
MAX_CHUNKS = 4
# A product of m rows does m FLOPs in bf16 for each byte of the weight that it reads, and every
# chunk reads the weight again. An H100 does 295 FLOPs in the time of a byte (989e12 a second for
# 3.35e12 bytes): below about 300 rows a product is as slow as the reading. 512 is the next power of
# two, and four tiles: what does not fill the last one is a fifth at most.
MIN_PRODUCT_ROWS = 512
# Rows of one rank in a chunk. They are a batch of the product, and cut into tiles by themselves:
# chunks are whole tiles.
TILE_ROWS = 128


class Order(NamedTuple):
    """The order in which rows of `size` ranks arrive: by chunk, and in a chunk by rank.

    `bounds` has the first row and the end of each chunk, among the rows of one rank.
    """

    size: int
    bounds: tuple[tuple[int, int], ...]

    def parts(self, rows: Tensor) -> list[Tensor]:
        """Views (size, rows of the chunk, ...) of each chunk of rows that are in this order."""
        return [
            rows[self.size * first : self.size * end].unflatten(0, (self.size, end - first))
            for first, end in self.bounds
        ]

    def arranged(self, rows: Tensor) -> Tensor:
        """Rows (size * n, width) that lie rank after rank, in this order: one copy, or none.

        Of the two tensors that a weight's gradient is the product of, the one that did not travel
        is brought into the order of the other. It is the narrower one: its features are split.
        """
        if not self.is_cut:
            return rows
        by_rank = rows.unflatten(0, (self.size, -1))
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for (first, end), part in zip(self.bounds, self.parts(out), strict=True):
            part.copy_(by_rank[:, first:end])
        return out

    @property
    def is_cut(self) -> bool:
        """Whether there are several chunks."""
        return len(self.bounds) > 1


# Of rows that lie rank after rank, or that have not been gathered.
AS_THEY_ARE = Order(1, ((0, 0),))


def is_large(total: int, ranks: Ranks) -> bool:
    """Whether communication may run beside a product of so many rows, over all ranks."""
    # What is traced is not asked for its size: one graph holds for all sizes.
    return ranks.size > 1 and not torch.compiler.is_compiling() and total >= MIN_ROWS


def order_of(rows: int, ranks: Ranks, *, total: int, blocks: int) -> Order:
    """How each rank's rows are cut: into one chunk where overlap does not pay, or is traced.

    Args:
        rows: of one rank.
        total: of the whole product.
        blocks: how many ranks' rows of a chunk a product takes at least. There are as many chunks,
            MAX_CHUNKS at most, as leave MIN_PRODUCT_ROWS to it.
    """
    if not is_large(total, ranks):
        return AS_THEY_ARE
    tiles = rows // TILE_ROWS
    for chunks in range(MAX_CHUNKS, 1, -1):
        shortest = tiles // chunks * TILE_ROWS
        if shortest and blocks * shortest >= MIN_PRODUCT_ROWS:
            edges = [*(tiles * i // chunks * TILE_ROWS for i in range(chunks)), rows]
            return Order(ranks.size, tuple(itertools.pairwise(edges)))
    return AS_THEY_ARE


def blocks_of_ranks(order: Order, rank: int) -> list[tuple[int, int]]:
    """The ranks whose rows of a chunk are one product, as the first and the end of each block.

    Own rows are here before anything travels. One product of them covers the first chunk's way,
    and the others' rows of a chunk are one product on the first rank and the last. On the ranks
    between they lie on both sides of the own: two products. Where one of all these is too short to
    be worth it, own rows are a block with the others'.
    """
    sides = [(first, end) for first, end in ((0, rank), (rank + 1, order.size)) if first < end]
    rows = order.bounds[-1][1]
    shortest = min(end - first for first, end in order.bounds)
    least = min(rows, *(shortest * (end - first) for first, end in sides))
    return sides if least >= MIN_PRODUCT_ROWS else [(0, order.size)]
