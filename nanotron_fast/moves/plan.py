"""Files, and the moves between them: proved to fill the files, and shared between processes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nanotron_fast.errors import PlanError
from nanotron_fast.moves import shares
from nanotron_fast.moves.checksums import Checksum
from nanotron_fast.moves.coverage import Extent, cover, extent_of
from nanotron_fast.moves.cuts import can_be_cut, within
from nanotron_fast.moves.move import Move
from nanotron_fast.moves.row import FILL
from nanotron_fast.moves.shares import Part


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file to be written: path relative to the destination, header, whole size.

    `literals` are further bytes that no move writes, each with its offset, in order: other headers,
    a directory at the end. `checksums` are written over some of them once the file is whole.
    `part`: the bytes, from the first number up to the second, that are written of a file that is
    there already in its whole size; others write the rest of it. None stands for the whole file.
    """

    path: str
    header: bytes
    size_bytes: int
    literals: tuple[tuple[int, bytes], ...] = ()
    checksums: tuple[Checksum, ...] = ()
    part: tuple[int, int] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes that are written: of the file, or of its part."""
        return self.size_bytes if self.part is None else self.part[1] - self.part[0]


@dataclass(frozen=True, slots=True)
class MovePlan:
    """Files, and the moves between them."""

    sources: tuple[Path, ...]
    outputs: tuple[OutputFile, ...]
    moves: tuple[Move, ...]

    @property
    def bytes_read(self) -> int:
        """Bytes of source tensors that are copied, without the scales of quantised ones."""
        num_bits = sum(
            move.num_elements * move.source_dtype.bits for move in self.moves if move.source != FILL
        )
        return num_bits // 8

    @property
    def bytes_written(self) -> int:
        """Bytes of all output files, headers included; of a file in parts those of the part."""
        return sum(output.num_bytes for output in self.outputs)

    def check(self) -> None:
        """Proves that every byte of every output, or of its part, is written exactly once.

        Raises PlanError.
        """
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
            begin, end = output.part or (0, output.size_bytes)
            left = cover(output.path, extents, begin + len(output.header), end)
            if left:
                raise PlanError(
                    f"{output.path}: a move writes at byte {left[0].offset}, behind the end at "
                    f"{end}"
                )

    def without(self, paths: Collection[str]) -> MovePlan:
        """The plan without these outputs."""
        if not paths:
            return self
        return self.only(
            [index for index, output in enumerate(self.outputs) if output.path not in paths]
        )

    def share(self, rank: int, world_size: int, *, cuts: bool = False) -> MovePlan:
        """What one of several processes does: see `deal`."""
        return self.parts(self.deal(world_size, cuts=cuts)[rank])

    def deal(self, num_shares: int, *, cuts: bool = False) -> list[list[Part]]:
        """What each of several processes does: the same for all who have the plan.

        Args:
            num_shares: at least 1.
            cuts: large files may be cut where shares of whole ones are uneven.
        """
        files = [(each.path, each.size_bytes) for each in self.outputs]
        moves: list[list[Move]] = []

        def is_divisible(number: int) -> bool:
            if not moves:
                moves.extend([] for _ in self.outputs)
                for move in self.moves:
                    moves[move.destination].append(move)
            output, multiple = self.outputs[number], shares.CUT_MULTIPLE_BYTES
            return (
                not (output.literals or output.checksums)
                and len(output.header) <= multiple
                and all(can_be_cut(move, multiple) for move in moves[number])
            )

        return shares.parts_of(files, num_shares, can_be_cut=is_divisible if cuts else None)

    def only(self, mine: Sequence[int]) -> MovePlan:
        """The plan with these outputs alone, by their numbers."""
        return self.parts([Part(each, 0, self.outputs[each].size_bytes) for each in mine])

    def parts(self, mine: Sequence[Part]) -> MovePlan:
        """The plan with these outputs alone, or parts of them; at most one of each."""
        if list(mine) == [Part(at, 0, each.size_bytes) for at, each in enumerate(self.outputs)]:
            return self
        renumbered = {part.file: new for new, part in enumerate(mine)}
        outputs = [_part_of(self.outputs[part.file], part) for part in mine]
        moves: list[Move] = []
        for move in self.moves:
            new = renumbered.get(move.destination)
            if new is None:
                continue
            part = outputs[new].part
            pieces = [move] if part is None else within(move, *part)
            moves += [replace(piece, destination=new) for piece in pieces]
        return MovePlan(self.sources, tuple(outputs), tuple(moves))


def _part_of(output: OutputFile, part: Part) -> OutputFile:
    if (part.begin_bytes, part.end_bytes) == (0, output.size_bytes):
        return output
    header = b"" if part.begin_bytes else output.header
    return replace(output, header=header, part=(part.begin_bytes, part.end_bytes))
