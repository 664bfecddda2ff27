"""The matrices that parameters consist of, and which rank of a stage computes with which of them.

Experts that are split over ranks are computed with among the ranks of the stage that have the same.

A parameter's chunks (q, k and v; gate and up) are a matrix each, and so are gate, up and down of
every expert. A matrix is whole here: the tensor-parallel ranks' parts of it are joined. Each lies
in one piece in every rank's flattened shard, and so in a piece, or none, of every ZeRO run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanotron_fast.families.parts import Param
from nanotron_fast.families.roles import matrices_beside
from nanotron_fast.formats.nanotron.optimizer import Run
from nanotron_fast.kernels.runtime.collectives import Ranks, resolve
from nanotron_fast.model.spread import Span, has_copies, local_length
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.parameters import Trained

# So many elements of experts are computed with at once, or one expert: a bound for the memory that
# is the same at every topology, as the results are.
_MAX_ELEMENTS = 1 << 25


@dataclass(frozen=True, slots=True)
class Matrices:
    """Some matrices of a parameter that are computed with at once.

    Args:
        trained: the parameter.
        place: its index among all.
        run: their elements in a flattened shard.
        shape: (count, rows, columns) of a shard's part of them.
        split: the dimension along which shards are joined; None where every rank has all.
        spans: for each tensor-parallel rank, which rows of the whole matrices its part has, where
            several ranks have copies of some; else none.
        beside: matrices that lie beside each other in the columns.
    """

    trained: Trained
    place: int
    run: Run
    shape: tuple[int, int, int]
    split: int | None
    beside: int
    spans: tuple[tuple[Span, ...], ...] = ()

    @property
    def whole_shape(self) -> tuple[int, int]:
        """(rows, columns) of each of them, whole."""
        rows, columns = self.shape[1:]
        if self.spans:
            return max(span.whole + span.length for span in self.spans[-1]), columns
        whole, shard = self.trained.facts.whole_shape, self.trained.tensor.shape
        sizes = [rows, columns // self.beside]
        if self.split is not None:
            dim = self.split - 1
            sizes[dim] *= whole[dim] // shard[dim]
        return sizes[0], sizes[1]

    def part_of(self, run: Run) -> Run:
        """The elements of the flattened shard that a ZeRO run has of them; an empty run or not."""
        first = max(self.run[0], run[0])
        return first, max(first, min(self.run[1], run[1]))

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole matrices, (matrices, rows, columns), of every shard's part, flat."""
        shards = [part.view(self.shape) for part in parts]
        if self.spans:
            return self._from_spans(shards)
        whole = shards[0] if self.split is None else torch.cat(shards, self.split)
        # Of (count, rows, beside * columns).
        return whole.unflatten(2, (self.beside, -1)).transpose(1, 2).flatten(0, 1)

    def part(self, whole: Tensor, tp_rank: int) -> Tensor:
        """A shard's part of matrices as `joined` gives them, flat."""
        if self.spans:
            own = self.spans[tp_rank]
            rows = [whole.narrow(1, span.whole, span.length) for span in own]
            return torch.cat(rows, 1).reshape(-1)
        packed = whole.unflatten(0, (-1, self.beside)).transpose(1, 2).flatten(2)
        if self.split is not None:
            width = self.shape[self.split]
            packed = packed.narrow(self.split, tp_rank * width, width)
        return packed.reshape(-1)

    def _from_spans(self, shards: Sequence[Tensor]) -> Tensor:
        rows, columns = self.whole_shape
        whole = shards[0].new_empty(1, rows, columns)
        for shard, spans in zip(shards, self.spans, strict=True):
            for span in spans:
                part = shard.narrow(1, span.local, span.length)
                whole.narrow(1, span.whole, span.length).copy_(part)
        return whole


def matrices_of(trained: Trained, place: int, tp: int) -> Iterator[Matrices]:
    """The matrices of a parameter, in the order of its elements."""
    split = trained.facts.param.cuts.get("tp")
    spans = _spans(trained.facts.param, tp)
    first = 0
    for index, (count, rows, columns) in enumerate(_shapes(trained, tp)):
        end = first + count * rows * columns
        yield Matrices(
            trained,
            place,
            (first, end),
            (count, rows, columns),
            None if split is None else split + 1,
            matrices_beside(trained.facts.param),
            spans[index] if spans else (),
        )
        first = end


def _spans(param: Param, tp: int) -> list[tuple[tuple[Span, ...], ...]]:
    """Of each chunk, for each rank, counted from where the chunk begins; none without copies."""
    if not has_copies(param.heads, tp):
        return []
    lengths = param.chunks or (param.shape[0],)
    starts = [0, *itertools.accumulate(lengths)]
    found = []
    for start, length in zip(starts, lengths, strict=False):
        of_ranks = []
        for rank in range(tp):
            spans = [s for s in param.spans(tp, rank) if start <= s.whole < start + length]
            first = spans[0].local
            of_ranks.append(
                tuple(s._replace(local=s.local - first, whole=s.whole - start) for s in spans)
            )
        found.append(tuple(of_ranks))
    return found


def _shapes(trained: Trained, tp: int) -> list[tuple[int, int, int]]:
    """Count, rows and columns of a shard's part of each lot of matrices."""
    param, shape = trained.facts.param, trained.tensor.shape
    rows, columns = shape[-2:]
    if len(shape) == 3:
        assert "tp" not in param.cuts
        at_once = max(1, _MAX_ELEMENTS // (rows * columns))
        firsts = range(0, shape[0], at_once)
        return [(min(at_once, shape[0] - first), rows, columns) for first in firsts]
    if param.chunks is None:
        return [(1, rows, columns)]
    assert param.cuts["tp"] == 0
    heads = param.heads or (None,) * len(param.chunks)
    return [
        (1, local_length(length, of_chunk, tp), columns)
        for length, of_chunk in zip(param.chunks, heads, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Round:
    """Matrices of which each rank of a group computes with one lot, and what is exchanged for that.

    Rank `replica * tp + tp_rank` of the group has the lot of that index, or none.

    Args:
        ranks: the group: of all ranks of a stage, or of those that have the same experts.
        lots: at most one for each rank.
        own: this rank's part of each, in the flattened shard.
        sent: elements that it sends to each rank.
        received: elements that each rank sends to it.
        returned: the tensor-parallel rank of each rank, and its part of this rank's lot.
    """

    ranks: Ranks
    lots: tuple[Matrices, ...]
    own: tuple[Run, ...]
    sent: tuple[int, ...]
    received: tuple[int, ...]
    returned: tuple[tuple[int, Run], ...]


def rounds_of(parameters: Iterable[tuple[int, Trained]], mesh: Mesh) -> list[Round]:
    """All matrices of some parameters, those together that take equally long.

    Args:
        parameters: with their places.
    """
    all_lots = [lot for place, each in parameters for lot in matrices_of(each, place, mesh.tp)]
    found = []
    for of_experts in (False, True):
        lots = [lot for lot in all_lots if lot.trained.is_of_experts is of_experts]
        lots.sort(key=_cost, reverse=True)
        size = mesh.replicas(of_experts=of_experts).size * mesh.tp
        ranks = resolve(mesh.expert_stage_group if of_experts else mesh.stage_group)
        found += [
            _round(tuple(lots[at : at + size]), mesh.tp, ranks) for at in range(0, len(lots), size)
        ]
    return found


def _cost(lot: Matrices) -> int:
    """Products of an iteration go with this, but for a factor that all have alike."""
    return lot.shape[0] * lot.beside * math.prod(lot.whole_shape) * min(lot.whole_shape)


def _round(lots: tuple[Matrices, ...], tp: int, ranks: Ranks) -> Round:
    size, me = ranks.size, ranks.rank

    def part(lot: Matrices, rank: int) -> Run:
        return lot.part_of(lot.trained.runs[rank // tp])

    def sent(sender: int, owner: int) -> int:
        """Where several ranks have the same values, the owner's own row or column sends them."""
        if owner >= len(lots):
            return 0
        lot = lots[owner]
        is_shared_out = lot.trained.runs[0] != lot.trained.runs[-1]
        is_asked = (lot.split is not None or sender % tp == owner % tp) and (
            is_shared_out or sender // tp == owner // tp
        )
        first, end = part(lot, sender)
        return end - first if is_asked else 0

    returned = []
    if me < len(lots):
        returned = [(rank % tp, part(lots[me], rank)) for rank in range(size)]
    return Round(
        ranks,
        lots,
        tuple(part(lot, me) for lot in lots),
        tuple(sent(me, rank) for rank in range(size)),
        tuple(sent(rank, me) for rank in range(size)),
        tuple(returned),
    )
