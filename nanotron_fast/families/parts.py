"""What a family's rules come down to: boxes that both formats have in common.

A `Part` is a box of up to three dimensions, and where it lies in the tensors of either side. It
knows nothing of files. An axis of the topology (tp, ep) cuts it along one of its dimensions. Both
directions, and the way from one topology to another, come from the same parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import mul
from typing import NamedTuple

from nanotron_fast.errors import TopologyError
from nanotron_fast.model.spread import Heads, Span, has_copies, local_length, spans_of
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
    part's chunk starts along the dimension of the parameter that is cut. `heads` says that it
    counts key-value heads of which several ranks may have copies: the chunk's.
    """

    dim: int
    unit: str = "rows"
    chunk_start: int = 0
    heads: Heads | None = None

    def copies(self, size: int) -> int:
        """How many of `size` ranks have the same head."""
        return 1 if self.heads is None else self.heads.copies(size)


class Seat(NamedTuple):
    """Of a part that is whole on one rank of an axis: it is one of `total` equal ones along the
    dimension of the parameter that the axis cuts, in order of the ranks.

    `heads` says that they are key-value heads of which several ranks may have copies.
    """

    number: int
    total: int
    unit: str = "experts"
    heads: Heads | None = None

    def copies(self, size: int) -> int:
        """How many of `size` ranks have the same."""
        return 1 if self.heads is None else self.heads.copies(size)

    def is_of(self, rank: int, size: int) -> bool:
        """Whether a rank has the part."""
        copies = self.copies(size)
        return self.number * size // self.total == rank // copies * copies

    def start(self, rank: int, size: int) -> int:
        """The number of the first part that a rank has."""
        copies = self.copies(size)
        return rank // copies * max(self.total // size, 1)


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
        seats: for an axis that cuts the parameter between parts, and not the part.
    """

    tensors: tuple[Address, ...]
    param: Address
    sizes: Box
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    unpadded_rows: int | None = None
    seats: Mapping[str, Seat] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the tensor that we write it to."""
        return self.tensors[0].name

    def whole(self, address: Address) -> Share:
        """The part in a tensor that is not cut. `address` is one of `tensors`."""
        high = (self._rows, self.sizes[1], self.sizes[2])
        return _share((0, 0, 0), high, address, address.start, row_major(address.shape))

    def within(
        self,
        address: Address,
        low: Sequence[int],
        sizes: Sequence[int],
        strides: tuple[int, ...],
    ) -> Iterator[Share]:
        """What a chunk of a tensor holds of the part: a few boxes, or none.

        The chunk has the elements from index `low` on, `sizes` many along each dimension, and lies
        on its own with these strides; the shares' offsets are in it. `address` is one of
        `tensors`. A chunk may begin and end inside a head.
        """
        lengths = (self._rows, self.sizes[1], self.sizes[2])
        start = tuple(at - first for at, first in zip(address.start, low, strict=True))
        by_axis = [
            list(_ranges(address, lengths, axis, -start[axis], size - start[axis]))
            for axis, size in enumerate(sizes)
        ]
        for ranges in itertools.product(*by_axis):
            first, end = [0, 0, 0], [1, 1, 1]
            for dims in ranges:
                for dim, (begin, stop) in dims.items():
                    first[dim], end[dim] = begin, stop
            at = list(start)
            for dim, (axis, step) in enumerate(zip(address.axes, address.steps, strict=True)):
                at[axis] += first[dim] * step
            yield _share(_box(first), _box(end), address, tuple(at), strides)

    @property
    def _rows(self) -> int:
        """Of the box, without padding."""
        return self.sizes[0] if self.unpadded_rows is None else self.unpadded_rows


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter that is trained: what it is made of, and how the topology cuts it.

    Args:
        block: the decoder layer it belongs to, or "embedding", "norm" or "head".
        cuts: the dimension that each axis of the topology cuts. Empty: one file for all ranks, and
            so where "ep" alone is there, and of one rank.
        chunks: lengths along the dimension that tp cuts, each cut on its own (contiguous_chunks in
            Nanotron).
        heads: for each chunk, or for the only one, its key-value heads where ranks beyond them have
            copies; empty where no chunk has any.
        is_fp32: kept in fp32 whatever the model's dtype.
        is_frozen: no gradient moves it.
        initial: what all of it is in a model that starts from random weights; None: by its role.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    block: int | str
    cuts: Mapping[str, int] = field(default_factory=dict)
    chunks: tuple[int, ...] | None = None
    heads: tuple[Heads | None, ...] = ()
    is_fp32: bool = False
    is_frozen: bool = False
    initial: float | None = None

    def cuts_at(self, sizes: Sizes) -> dict[str, int]:
        """`cuts` by the axes that count: experts of one rank are not split."""
        return {
            axis: dim for axis, dim in self.cuts.items() if axis != "ep" or sizes.get(axis, 1) > 1
        }

    def shards(self, sizes: Sizes) -> Iterator[dict[str, int]]:
        """The ranks of each shard along the axes that cut the parameter, the last axis fastest."""
        cuts = self.cuts_at(sizes)
        for ranks in itertools.product(*(range(sizes.get(axis, 1)) for axis in cuts)):
            yield dict(zip(cuts, ranks, strict=True))

    def has(self, part: Part, sizes: Sizes, ranks: Sizes) -> bool:
        """Whether a rank's shard has something of a part."""
        return all(
            seat.is_of(ranks.get(axis, 0), sizes.get(axis, 1)) for axis, seat in part.seats.items()
        )

    def local_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The shape of one shard. Raises TopologyError where a part does not divide."""
        shape = list(self.shape)
        for axis, dim in self.cuts.items():
            size = sizes.get(axis, 1)
            for part in self.parts:
                if axis in part.seats:
                    seat = part.seats[axis]
                    if seat.copies(size) == 1 and seat.total % size:
                        raise TopologyError(
                            f"{self.name}: {seat.total} {seat.unit} do not split over {axis}={size}"
                        )
                    break
                cut = part.cuts[axis]
                copies = cut.copies(size)
                if copies == 1 and part.sizes[cut.dim] % size:
                    raise TopologyError(
                        f"{self.name}: {part.sizes[cut.dim]} {cut.unit} do not split over "
                        f"{axis}={size}"
                    )
                if cut.heads is not None and cut.heads.num_divided % copies:
                    raise TopologyError(
                        f"{self.name}: {cut.heads.num_divided} rows of the queries of each kv head "
                        f"do not split over the {copies} ranks of {axis}={size} that have it"
                    )
            shape[dim] = self._local_length(dim, size) if axis == "tp" else shape[dim] // size
        return tuple(shape)

    def _local_length(self, dim: int, size: int) -> int:
        if not has_copies(self.heads, size):
            return self.shape[dim] // size
        return sum(map(local_length, self._chunks, self.heads, itertools.repeat(size)))

    @property
    def _chunks(self) -> tuple[int, ...]:
        return self.chunks or (self.shape[self.cuts["tp"]],)

    def spans(self, size: int, rank: int) -> tuple[Span, ...]:
        """What a tensor-parallel rank's shard has of the dimension that tp cuts."""
        return spans_of(self._chunks, self.heads, size=size, rank=rank)

    def copy_of(self, part: Part, sizes: Sizes, ranks: Sizes) -> int:
        """Which copy of a part a rank's shard has: 0 for the first, and where there is but one."""
        for axis, cut in part.cuts.items():
            copies = cut.copies(sizes.get(axis, 1))
            if copies > 1 and not self._is_divided(part, axis, cut):
                return ranks.get(axis, 0) % copies
        for axis, seat in part.seats.items():
            copies = seat.copies(sizes.get(axis, 1))
            if copies > 1:
                return ranks.get(axis, 0) % copies
        return 0

    def _is_divided(self, part: Part, axis: str, cut: Cut) -> bool:
        """Whether ranks with the same head have parts of it of this part, and no copies."""
        row = part.param.start[self.cuts[axis]] - cut.chunk_start
        return cut.heads is not None and row < cut.heads.num_divided

    def share(self, part: Part, sizes: Sizes, ranks: Sizes) -> Share:
        """What a rank's shard has of a part that it `has`. Raises TopologyError."""
        strides = row_major(self.local_shape(sizes))
        start, low, high = list(part.param.start), [0, 0, 0], list(part.sizes)
        for axis, cut in part.cuts.items():
            size, rank = sizes.get(axis, 1), ranks.get(axis, 0)
            if axis == "tp" and has_copies(self.heads, size):
                self._place(part, cut, size, rank, start, low, high)
                continue
            length = part.sizes[cut.dim] // size
            low[cut.dim], high[cut.dim] = rank * length, (rank + 1) * length
            # A shard's chunk starts 1/size as far into it as the chunk into the parameter.
            start[self.cuts[axis]] -= cut.chunk_start - cut.chunk_start // size
        for axis, seat in part.seats.items():
            start[self.cuts[axis]] -= seat.start(ranks.get(axis, 0), sizes.get(axis, 1))
        return _share(_box(low), _box(high), part.param, tuple(start), strides)

    def _place(
        self,
        part: Part,
        cut: Cut,
        size: int,
        rank: int,
        start: list[int],
        low: list[int],
        high: list[int],
    ) -> None:
        """Says what a tensor-parallel rank has of a part, and where, where some ranks have copies.

        Of what ranks with the same head share out, the rows of a head are the box's next dimension.
        """
        dim = self.cuts["tp"]
        first_row = start[dim] - cut.chunk_start
        start[dim] = self._chunk_start(cut.chunk_start, size) + first_row
        copies = cut.copies(size)
        if cut.heads is None or copies == 1:
            length = part.sizes[cut.dim] // size
            low[cut.dim], high[cut.dim] = rank * length, (rank + 1) * length
            return
        head, copy = divmod(rank, copies)
        low[cut.dim], high[cut.dim] = head, head + 1
        divided = cut.heads.num_divided // copies
        if self._is_divided(part, "tp", cut):
            low[cut.dim + 1], high[cut.dim + 1] = copy * divided, (copy + 1) * divided
        else:
            start[dim] -= cut.heads.num_divided - divided

    def _chunk_start(self, chunk_start: int, size: int) -> int:
        """Where a chunk begins in a shard, from where it begins in the parameter."""
        start = local = 0
        for length, heads in zip(self._chunks, self.heads, strict=True):
            if start == chunk_start:
                break
            start, local = start + length, local + local_length(length, heads, size)
        return local


def _share(
    low: Box, high: Box, address: Address, start: tuple[int, ...], strides: tuple[int, ...]
) -> Share:
    strides = strides or (0,)  # A tensor without dimensions has one element.
    (a, b, c), (i, j, k) = address.steps, address.axes
    return Share(
        low,
        high,
        sum(map(mul, start, strides)),
        (a * strides[i], b * strides[j], c * strides[k]),
    )


def _ranges(
    address: Address, lengths: Box, axis: int, low: int, high: int
) -> Iterator[dict[int, tuple[int, int]]]:
    """Ranges of the box's dimensions that together run over indices `low` to `high` of an axis.

    Indices are counted from where the part starts. The dimensions of an axis are nested: the rows
    of a head, the heads. A range of indices is a few boxes: the end of a head, whole heads, the
    beginning of a head.
    """
    dims = [dim for dim in range(3) if address.axes[dim] == axis and lengths[dim] != 1]
    dims.sort(key=lambda dim: (-address.steps[dim], dim))
    yield from _nested(address.steps, lengths, dims, low, high)


def _nested(
    steps: Box, lengths: Box, dims: Sequence[int], low: int, high: int
) -> Iterator[dict[int, tuple[int, int]]]:
    if not dims:
        if low <= 0 < high:
            yield {}
        return
    dim, inner = dims[0], dims[1:]
    step, length = max(steps[dim], 1), lengths[dim]
    # Indices that one value of this dimension takes, from its first to the one behind its last.
    extent = 1 + sum(steps[each] * (lengths[each] - 1) for each in inner)
    first, end = max(0, -(-low // step)), min(length, (high - extent) // step + 1)
    if first < end:
        whole = {each: (0, lengths[each]) for each in inner}
        yield {dim: (first, end), **whole}
    if not inner:
        return
    start, stop = max(0, (low - extent) // step + 1), min(length, -(-high // step))
    if first >= end:
        first = end = stop
    for value in itertools.chain(range(start, first), range(end, stop)):
        begin = value * step
        for ranges in _nested(steps, lengths, inner, low - begin, high - begin):
            yield {dim: (value, value + 1), **ranges}


def _box(values: list[int]) -> Box:
    a, b, c = values
    return a, b, c
