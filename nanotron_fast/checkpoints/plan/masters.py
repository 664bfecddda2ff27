"""The fp32 masters of a training as a side to read from, in the place of its weights.

With ZeRO-1 a rank's shard lies in the files of several data-parallel ranks, each of which has a run
of it: a part of a parameter is cut where a run ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nanotron_fast.checkpoints.plan.equality import MustBeEqual, of_kv_heads
from nanotron_fast.checkpoints.plan.sides import NanotronSource, piece_of
from nanotron_fast.checkpoints.states import TrainingStates
from nanotron_fast.errors import CheckpointError
from nanotron_fast.families.parts import Param, Part, Share, Sizes
from nanotron_fast.formats.nanotron.checkpoint import OPTIMIZER, NanotronCheckpoint
from nanotron_fast.formats.nanotron.optimizer import MASTERS, check_beside_weights
from nanotron_fast.model.spread import has_copies
from nanotron_fast.moves.boxes import Box
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.pieces import Piece


class MastersSource(NanotronSource):
    """The masters of a checkpoint's parameters, which must be there beside the weights.

    Raises CheckpointError where there are no masters, or they are not of these weights.
    """

    state = MASTERS

    def __init__(self, checkpoint: NanotronCheckpoint) -> None:
        super().__init__(checkpoint)
        folder = checkpoint.root / OPTIMIZER
        if not folder.is_dir():
            raise CheckpointError(
                f"--master-weights: {checkpoint.root} has no {OPTIMIZER}/, where masters would be"
            )
        self.states = TrainingStates.read(checkpoint.root)
        check_beside_weights(self.states.found, checkpoint)
        if not self.states.first_of(0).has_masters:
            raise CheckpointError(
                f"--master-weights: {folder} has no {MASTERS}: this training kept no masters"
            )

    def dtype(self, param: Param) -> Dtype:
        """The dtype of a parameter's masters; what is not trained has none but itself."""
        if param.is_frozen:
            return super().dtype(param)
        self._shards(param)
        shape = param.local_shape(self.sizes)
        return next(shard.dtype for shard in self.states.shards_of(param, MASTERS, shape))

    def _shares(self, param: Param, part: Part) -> Iterator[tuple[Sizes, Piece]]:
        if param.is_frozen:
            return super()._shares(param, part)
        self._shards(param)
        return shares_of(self.states, param, part, MASTERS, self.sizes, self.files.number)


def shares_of(
    states: TrainingStates,
    param: Param,
    part: Part,
    key: str,
    sizes: Sizes,
    number: Callable[[Path], int],
) -> Iterator[tuple[Sizes, Piece]]:
    """What each rank has of a part of a state, in pieces: the ranks with each of them.

    Args:
        key: of the state, as files have it.
        sizes: of the groups that wrote the states.
        number: gives the number of a file among the sources.
    """
    for shard in states.shards_of(param, key, param.local_shape(sizes)):
        if not param.has(part, sizes, shard.ranks):
            continue
        share = param.share(part, sizes, shard.ranks)
        file = number(shard.tensor.path)
        cut = [share] if shard.run is None else within(share, *shard.run)
        for each in cut:
            piece = piece_of(each, file, shard.tensor.offset_bytes, shard.dtype)
            yield shard.ranks, piece


def copies_of_states(
    states: TrainingStates, params: Iterable[Param], number: Callable[[Path], int]
) -> Iterator[MustBeEqual]:
    """What several ranks have copies of among states, beside what the first of them has.

    `params` are as they were stored. Raises CheckpointError where a state is missing.
    """
    sizes = states.sizes.axes
    for param in params:
        if not has_copies(param.heads, states.sizes.tp) or param.is_frozen:
            continue
        for key, part in itertools.product(states.keys_of(param.name), param.parts):
            shares = shares_of(states, param, part, key, sizes, number)
            yield from of_kv_heads(param, part, shares, sizes, what=key)


def within(share: Share, first: int, end: int) -> list[Share]:
    """What a share of a flattened shard has among the elements from `first` up to `end`.

    Returns boxes, whose offsets are counted from `first`.
    """
    found = []
    for low, high, offset in _cut(share.low, share.high, share.offset, share.strides, first, end):
        found.append(Share(low, high, offset - first, share.strides))
    return found


def _cut(
    low: Box, high: Box, offset: int, strides: Box, first: int, end: int
) -> Iterator[tuple[Box, Box, int]]:
    """The boxes of a box whose elements lie between two offsets; `offset` is that of `low`."""
    sizes = [b - a for a, b in zip(low, high, strict=True)]
    if min(sizes) < 1:
        return
    reach = [(size - 1) * stride for size, stride in zip(sizes, strides, strict=True)]
    if offset + sum(reach) < first or offset >= end:
        return
    if offset >= first and offset + sum(reach) < end:
        yield low, high, offset
        return
    # The dimension with the longest stride: most of its slices lie on one side of each border.
    dim = max((n for n in range(3) if sizes[n] > 1), key=lambda n: strides[n])
    stride, inner = strides[dim], sum(reach) - reach[dim]
    # Slices from `whole` up to `behind` lie between the borders; those beside them across one.
    whole = min(sizes[dim], max(0, -(-(first - offset) // stride)))
    behind = max(whole, min(sizes[dim], (end - offset - inner - 1) // stride + 1))
    if behind > whole:
        yield (
            _slices(low, dim, low[dim] + whole),
            _slices(high, dim, low[dim] + behind),
            (offset + whole * stride),
        )
    for index in (*range(whole), *range(behind, sizes[dim])):
        at = offset + index * stride
        if at + inner >= first and at < end:
            start = low[dim] + index
            one = _slices(low, dim, start), _slices(high, dim, start + 1)
            yield from _cut(*one, at, strides, first, end)


def _slices(box: Box, dim: int, value: int) -> Box:
    a, b, c = (value if n == dim else each for n, each in enumerate(box))
    return a, b, c
