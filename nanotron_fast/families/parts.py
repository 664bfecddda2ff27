"""What a family's rules come down to: boxes that both formats have in common.

A `Part` is a box of up to three dimensions, with each side's own strides. It knows nothing of
ranks: tensor parallelism cuts it along one of its dimensions. Both directions, and the way from
one topology to another, come from the same parts.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanotron_fast.errors import TopologyError
from nanotron_fast.moves.boxes import Box, row_major


@dataclass(frozen=True, slots=True)
class Address:
    """Where a part lies in a Hugging Face tensor; offset and strides in elements."""

    name: str
    shape: tuple[int, ...]
    offset: int
    strides: Box


@dataclass(frozen=True, slots=True)
class Part:
    """A box of elements that a Hugging Face tensor and a Nanotron parameter have in common.

    `hf` holds the places where it may be found, the one that we write first. In the Nanotron
    parameter an element's index along dimension `axes[n]` grows by `steps[n]` with the box's n-th
    coordinate, from `start`.
    """

    hf: tuple[Address, ...]
    sizes: Box
    start: tuple[int, ...]
    axes: Box
    steps: Box
    # The box's dimension that tensor parallelism cuts, and what it counts there.
    cut: int | None = None
    cut_unit: str = "rows"
    # Where the part's chunk starts along the parameter's split dimension.
    chunk_start: int = 0
    # The box's first dimension is this long in Hugging Face, and padded in Nanotron.
    hf_rows: int | None = None


@dataclass(frozen=True, slots=True)
class Param:
    """A Nanotron parameter: what it is made of, and how tensor parallelism splits it."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    # The decoder layer it belongs to, or "embedding", "norm" or "head".
    block: int | str
    # The dimension that is split over ranks. None: one file, the same for all of them.
    split: int | None = None
    # Lengths along `split` that are split each on their own (contiguous_chunks in Nanotron).
    chunks: tuple[int, ...] | None = None
    # Kept in fp32 in Nanotron whatever the model's dtype.
    is_fp32: bool = False

    def local_shape(self, tp: int) -> tuple[int, ...]:
        """The shape of one rank's shard. Raises TopologyError where a chunk does not divide."""
        if self.split is None:
            return self.shape
        for part in self.parts:
            if part.cut is not None and part.sizes[part.cut] % tp:
                way_out = "; --pad-vocab-to-multiple-of adds rows" if part.hf_rows else ""
                raise TopologyError(
                    f"{self.name}: {part.sizes[part.cut]} {part.cut_unit} do not split over "
                    f"tp={tp}{way_out}"
                )
        return tuple(
            size // tp if dim == self.split else size for dim, size in enumerate(self.shape)
        )

    def locate(self, part: Part, tp: int, rank: int) -> tuple[int, int, int, Box]:
        """Where a part lies in a rank's shard: (first, end) along its cut, offset and strides.

        The offset is that of the first element of the rank's share, in elements.
        """
        strides = row_major(self.local_shape(tp))
        start = list(part.start)
        low, high = 0, 0
        if part.cut is not None:
            share = part.sizes[part.cut] // tp
            low, high = rank * share, (rank + 1) * share
            # A rank's chunk starts 1/tp as far into its shard as the chunk into the parameter.
            start[part.axes[part.cut]] -= part.chunk_start - part.chunk_start // tp
        offset = sum(index * stride for index, stride in zip(start, strides, strict=True))
        a, b, c = (step * strides[axis] for step, axis in zip(part.steps, part.axes, strict=True))
        return low, high, offset, (a, b, c)
