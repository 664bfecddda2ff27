"""What a family's rules come down to: boxes that both formats have in common.

A `Part` is a box of up to three dimensions, and where it lies in the tensors of either side. It
knows nothing of files. An axis of the topology (tp, ep) cuts it along one of its dimensions. Both
directions, and the way from one topology to another, come from the same parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import mul
from typing import NamedTuple

from nanotron_fast.errors import TopologyError
from nanotron_fast.moves.boxes import Box, row_major

# A number for each axis of the topology: its size, or a rank along it. An absent axis has one rank.
Sizes = Mapping[str, int]


class Address(NamedTuple):
    """Where a part lies in a tensor.

    An element's index along dimension `axes[n]` grows by `steps[n]` with the box's n-th
    coordinate, from `start`.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    axes: Box
    steps: Box


class Cut(NamedTuple):
    """How an axis of the topology cuts a part.

    `dim` is the box's dimension, `unit` says what it counts there, and `chunk_start` is where the
    part's chunk starts along the dimension of the parameter that is cut.
    """

    dim: int
    unit: str = "rows"
    chunk_start: int = 0


class Share(NamedTuple):
    """What one shard has of a part: which box of it, and where that lies in the shard.

    `offset` is that of the box's first element; offset and strides are in elements.
    """

    low: Box
    high: Box
    offset: int
    strides: Box


@dataclass(frozen=True, slots=True)
class Part:
    """A box of elements that the tensors of both sides have in common.

    Args:
        tensors: where it may be found among the tensors of a model as it is published; the first
            is where we write it.
        param: where it lies in the parameter that is trained.
        cuts: how each axis of the topology that cuts the parameter cuts the part.
        unpadded_rows: the box's first dimension is this long in `tensors`, and padded in `param`.
    """

    tensors: tuple[Address, ...]
    param: Address
    sizes: Box
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    unpadded_rows: int | None = None

    @property
    def name(self) -> str:
        """Of the tensor that we write it to."""
        return self.tensors[0].name

    def whole(self, address: Address) -> Share:
        """The part in a tensor that is not cut. `address` is one of `tensors`."""
        rows = self.sizes[0] if self.unpadded_rows is None else self.unpadded_rows
        high = (rows, self.sizes[1], self.sizes[2])
        return _share((0, 0, 0), high, address, address.start, row_major(address.shape))


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter that is trained: what it is made of, and how the topology cuts it.

    Args:
        block: the decoder layer it belongs to, or "embedding", "norm" or "head".
        cuts: the dimension that each axis of the topology cuts. Empty: one file for all ranks.
        chunks: lengths along the dimension that tp cuts, each cut on its own (contiguous_chunks in
            Nanotron).
        is_fp32: kept in fp32 whatever the model's dtype.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    block: int | str
    cuts: Mapping[str, int] = field(default_factory=dict)
    chunks: tuple[int, ...] | None = None
    is_fp32: bool = False

    def shards(self, sizes: Sizes) -> Iterator[dict[str, int]]:
        """The ranks of each shard along the axes that cut the parameter, the last axis fastest."""
        for ranks in itertools.product(*(range(sizes.get(axis, 1)) for axis in self.cuts)):
            yield dict(zip(self.cuts, ranks, strict=True))

    def local_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The shape of one shard. Raises TopologyError where a part does not divide."""
        shape = list(self.shape)
        for axis, dim in self.cuts.items():
            size = sizes.get(axis, 1)
            for part in self.parts:
                cut = part.cuts[axis]
                if part.sizes[cut.dim] % size:
                    raise TopologyError(
                        f"{self.name}: {part.sizes[cut.dim]} {cut.unit} do not split over "
                        f"{axis}={size}"
                    )
            shape[dim] //= size
        return tuple(shape)

    def share(self, part: Part, sizes: Sizes, ranks: Sizes) -> Share:
        """What a rank's shard has of a part. Raises TopologyError where it does not divide."""
        strides = row_major(self.local_shape(sizes))
        start, low, high = list(part.param.start), [0, 0, 0], list(part.sizes)
        for axis, cut in part.cuts.items():
            size, rank = sizes.get(axis, 1), ranks.get(axis, 0)
            length = part.sizes[cut.dim] // size
            low[cut.dim], high[cut.dim] = rank * length, (rank + 1) * length
            # A shard's chunk starts 1/size as far into it as the chunk into the parameter.
            start[self.cuts[axis]] -= cut.chunk_start - cut.chunk_start // size
        return _share(_box(low), _box(high), part.param, tuple(start), strides)


def _share(
    low: Box, high: Box, address: Address, start: tuple[int, ...], strides: tuple[int, ...]
) -> Share:
    (a, b, c), (i, j, k) = address.steps, address.axes
    return Share(
        low,
        high,
        sum(map(mul, start, strides)),
        (a * strides[i], b * strides[j], c * strides[k]),
    )


def _box(values: list[int]) -> Box:
    a, b, c = values
    return a, b, c
