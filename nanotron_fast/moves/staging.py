"""Cutting the moves from files to memory into batches that fit a buffer of bounded size.

A move is read, run by run, into a staging buffer, where it lies without the gaps that it has in its
file, and is laid out from there. What needs no laying out can be read to where it belongs. What is
quantised becomes values as it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from nanotron_fast.moves.boxes import Box
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.move import Move
from nanotron_fast.moves.row import FILL
from nanotron_fast.moves.scales import Code

# Where a piece begins in a staging buffer: as a device's widest accesses like it.
ALIGNMENT_BYTES = 256
# A run this long is worth a read of its own.
_DIRECT_RUN_BYTES = 32 << 10
# What is read straight into tensors at a time, so that somebody can see it go on.
_DIRECT_BYTES = 256 << 20


@dataclass(slots=True)
class Batch:
    """What is read and then laid out at a time.

    `reads` go from files to tensors or, by the number behind theirs, to the staging buffer. `packs`
    go from the staging buffer, their only source, to tensors, or fill with zeros.
    """

    reads: list[Move] = field(default_factory=list)
    packs: list[Move] = field(default_factory=list)
    staged_bytes: int = 0
    direct_bytes: int = 0


def batches_of(
    moves: Sequence[Move], capacity: int, *, staging: int, reads_direct: bool
) -> Iterator[Batch]:
    """Batches of at most `capacity` bytes in the buffer, in the order of the files.

    `staging` is the number of the staging buffer among the destinations of reads. `reads_direct`:
    the tensors can be read into, as those in a device's memory cannot.
    """
    capacity -= capacity % ALIGNMENT_BYTES
    batch = Batch(packs=[move for move in moves if move.source == FILL])
    # What a batch has read already: copies of a tied matrix are made from the same bytes.
    places: dict[tuple[object, ...], int] = {}
    ordered = sorted(
        (move for move in moves if move.source != FILL),
        key=lambda move: (move.source, move.source_offset),
    )
    for whole in ordered:
        if reads_direct and _is_direct(whole):
            for move in _pieces(whole, _DIRECT_BYTES):
                if batch.direct_bytes + _span_bytes(move) > _DIRECT_BYTES:
                    yield batch
                    batch, places = Batch(), {}
                batch.reads.append(move)
                batch.direct_bytes += _span_bytes(move)
            continue
        for move in _pieces(whole, capacity):
            num_bytes = -(-_span_bytes(move) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            if batch.staged_bytes + num_bytes > capacity:
                yield batch
                batch, places = Batch(), {}
            key = (
                move.source,
                move.source_offset,
                move.sizes,
                move.source_strides,
                move.source_dtype,
                _staged_dtype(move),
            )
            if key not in places:
                places[key] = batch.staged_bytes
                batch.reads.append(_read_of(move, staging, batch.staged_bytes))
                batch.staged_bytes += num_bytes
            strides = _staged_strides(move)
            pack = replace(
                move,
                source=0,
                source_offset=places[key],
                source_strides=strides,
                source_dtype=_staged_dtype(move),
                scales=None,
            )
            batch.packs.append(pack)
    if batch.reads or batch.packs:
        yield batch


def _by_stride(move: Move) -> list[int]:
    """The dimensions longer than one, from that in which the source runs on outwards."""
    return sorted(
        (dim for dim in range(3) if move.sizes[dim] > 1), key=lambda dim: move.source_strides[dim]
    )


def _staged_dtype(move: Move) -> Dtype:
    """The dtype that a move has in the staging buffer."""
    return move.destination_dtype if isinstance(move.source_dtype, Code) else move.source_dtype


def _has_runs(move: Move) -> bool:
    """Whether runs can be read. A rotary half of a bias has none: its elements lie apart."""
    if isinstance(move.source_dtype, Code):
        return True  # what becomes values is taken apart as it is read
    dims = _by_stride(move)
    return not dims or move.source_strides[dims[0]] == 1


def _staged_strides(move: Move) -> Box:
    """Strides in the staging buffer: those of the file without gaps, in the same order."""
    if not _has_runs(move):
        return move.source_strides
    strides, stride = [1, 1, 1], 1
    for dim in _by_stride(move):
        strides[dim] = stride
        stride *= move.sizes[dim]
    a, b, c = strides
    return a, b, c


def _span_bytes(move: Move) -> int:
    """Bytes that a move takes in the staging buffer."""
    strides = _staged_strides(move)
    last = sum((size - 1) * stride for size, stride in zip(move.sizes, strides, strict=True))
    return (last + 1) * _staged_dtype(move).itemsize


def _read_of(move: Move, staging: int, offset: int) -> Move:
    """The move from the file to the staging buffer."""
    read = replace(
        move,
        destination=staging,
        destination_offset=offset,
        destination_strides=_staged_strides(move),
        destination_dtype=_staged_dtype(move),
    )
    if _has_runs(move):
        return read
    # Single elements: all that lies between the first and the last is read with them.
    sizes = (_span_bytes(move) // move.source_dtype.itemsize, 1, 1)
    return replace(read, sizes=sizes, source_strides=(1, 1, 1), destination_strides=(1, 1, 1))


def _is_direct(move: Move) -> bool:
    """Whether runs of a file are, whole or in long pieces, runs of the destination."""
    if move.source_dtype is not move.destination_dtype or not _has_runs(move):
        return False
    run = common = 1
    for dim in _by_stride(move):
        if move.source_strides[dim] != run:
            break
        if common == run and move.destination_strides[dim] == run:
            common *= move.sizes[dim]
        run *= move.sizes[dim]
    return common == run or common * move.source_dtype.itemsize >= _DIRECT_RUN_BYTES


def _pieces(move: Move, capacity: int) -> Iterator[Move]:
    """The move, cut where it is larger than a buffer."""
    num_bytes = _span_bytes(move)
    if num_bytes <= capacity:
        yield move
        return
    dim = _by_stride(move)[-1]
    size = move.sizes[dim]
    step = max(1, min(size - 1, size * capacity // num_bytes))
    for start in range(0, size, step):
        sizes = list(move.sizes)
        sizes[dim] = min(step, size - start)
        a, b, c = sizes
        piece = replace(
            move,
            source_offset=move.source_offset
            + start * move.source_strides[dim] * move.source_dtype.itemsize,
            destination_offset=move.destination_offset
            + start * move.destination_strides[dim] * move.destination_dtype.itemsize,
            sizes=(a, b, c),
        )
        yield from _pieces(piece, capacity)
