"""Files, and the moves between them: proved to fill the files, and shared between processes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nanotron_fast.errors import PlanError
from nanotron_fast.moves.checksums import Checksum
from nanotron_fast.moves.coverage import Extent, cover, extent_of
from nanotron_fast.moves.move import Move
from nanotron_fast.moves.row import FILL
from nanotron_fast.moves.shares import owners_of


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file to be written: path relative to the destination, header, whole size.

    `literals` are further bytes that no move writes, each with its offset, in order: other headers,
    a directory at the end. `checksums` are written over some of them once the file is whole.
    """

    path: str
    header: bytes
    size_bytes: int
    literals: tuple[tuple[int, bytes], ...] = ()
    checksums: tuple[Checksum, ...] = ()


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
            for offset, literal in output.literals:
                extents.append(extent_of(offset, 1, (len(literal),), (1,)))
            extents.sort(key=lambda extent: extent.offset)
            start = len(output.header)
            left = cover(output.path, extents, start, output.size_bytes)
            if left:
                raise PlanError(
                    f"{output.path}: a move writes at byte {left[0].offset}, behind the end at "
                    f"{output.size_bytes}"
                )

    def without(self, paths: Collection[str]) -> MovePlan:
        """The plan without these outputs."""
        if not paths:
            return self
        return self.only(
            [index for index, output in enumerate(self.outputs) if output.path not in paths]
        )

    def share(self, rank: int, world_size: int) -> MovePlan:
        """What one of several processes does: some of the files, whole; see `shares.owners_of`."""
        if world_size == 1:
            return self
        owners = owners_of([(each.path, each.size_bytes) for each in self.outputs], world_size)
        return self.only([index for index, owner in enumerate(owners) if owner == rank])

    def only(self, mine: Sequence[int]) -> MovePlan:
        """The plan with these outputs alone, by their numbers."""
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
