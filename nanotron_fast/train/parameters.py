"""The parameters that a rank trains, each with what the optimizer has to know of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nanotron_fast.formats.nanotron.optimizer import Run, runs_of
from nanotron_fast.models.decoder import Decoder
from nanotron_fast.models.facts import Facts
from nanotron_fast.train.mesh import Mesh, Replicas
from nanotron_fast.train.sharded import runs_of_rows, shard
from nanotron_fast.train.zero import gathered


@dataclass(frozen=True, slots=True)
class Trained:
    """One parameter of this rank.

    Args:
        facts: what the model says of it.
        tensor: its values, contiguous; with ZeRO-3 a DTensor, of which a rank has its run alone.
        dtype: of the values that products see.
        replicas: the ranks that have the same, with this one.
        runs: of each of them, which elements it keeps the optimizer's states of: with ZeRO-0 all of
            them, on every rank.
        run: that of this rank.
        stored_runs: of each of them, which elements its files have.
        is_counted: this rank's gradient belongs into the norm over all ranks.
        is_by_rows: no rank has more of it than its run.
        is_of_experts: it is of the experts of this rank, and other data-parallel ranks have others.
        is_first_copy: of what several ranks have copies of, this one's counts in a norm.
    """

    facts: Facts
    tensor: nn.Parameter
    dtype: torch.dtype
    replicas: Replicas
    runs: tuple[Run, ...]
    run: Run
    stored_runs: tuple[Run, ...]
    is_counted: bool
    is_by_rows: bool = False
    is_of_experts: bool = False
    is_first_copy: bool = True

    @property
    def name(self) -> str:
        """By which files know it: a matrix that two stages have goes by the embedding's name."""
        return self.facts.stored_name

    def is_decayed(self, excluded: Iterable[str]) -> bool:
        """As of `Facts`; the two copies of a tied matrix alike, by the name in files."""
        return replace(self.facts, name=self.name).is_decayed(excluded)

    @property
    def num_elements(self) -> int:
        return int(self.tensor.numel())

    def share(self, tensor: Tensor) -> Tensor:
        """This rank's run of a tensor that lies as the parameter does: a view, flat."""
        if self.is_by_rows:
            local: Any = tensor
            own: Tensor = local.to_local().view(-1)
            return own
        first, end = self.run
        return tensor.view(-1)[first:end]

    @property
    def copied(self) -> Run:
        """The elements of this rank's run that other tensor-parallel ranks have copies of."""
        (first, end), (low, high) = self.run, self.facts.copied
        start = max(low, first) - first
        return start, max(start, min(high, end) - first)

    def counted(self, share: Tensor) -> tuple[Tensor, ...]:
        """What of this rank's run counts in a norm over all ranks, where any of it does."""
        if self.is_first_copy:
            return (share,)
        first, end = self.copied
        return share[:first], share[end:]

    def values(self) -> Tensor:
        """All values that products see. Where `is_by_rows`, all of `replicas` call it."""
        values = self.tensor.detach()
        if not self.is_by_rows:
            return values
        own = self.share(values).to(self.dtype)
        return gathered(own, self.runs, self.replicas.group).view(self.tensor.shape)

    def stored(self, own: Tensor) -> Tensor:
        """What this rank's files have of a state of which it keeps its run: flat.

        All of `replicas` call it.
        """
        if self.runs == self.stored_runs:
            return own
        if self.is_by_rows:
            own = gathered(own, self.runs, self.replicas.group)
        first, end = self.stored_runs[self.replicas.rank]
        return own[first:end]


def trained_parameters(
    parts: Sequence[nn.Module],
    facts: Sequence[Mapping[str, Facts]],
    mesh: Mesh,
    *,
    zero_stage: int,
) -> list[Trained]:
    """What a rank trains, in the order of its modules.

    Args:
        parts: the modules of this rank, with their values.
        facts: of each of them, of all its parameters.
        zero_stage: 1 shares the optimizer's states out over data-parallel ranks; 0 does not; 3
            shares the parameters out as well: each part, a Decoder, is changed to that.
    """
    found = []
    for part, known in zip(parts, facts, strict=True):
        dtypes = {name: tensor.dtype for name, tensor in part.named_parameters()}
        stages = {name: _stage(fact, mesh, zero_stage) for name, fact in known.items()}
        if zero_stage == 3 and mesh.dp > 1:
            assert isinstance(part, Decoder)
            shard(part, mesh, whole={name for name, stage in stages.items() if stage == 0})
        for name, tensor in part.named_parameters():
            if tensor.requires_grad:
                found.append(
                    _trained(
                        known[name],
                        tensor,
                        dtypes[name],
                        mesh,
                        zero_stage=stages[name],
                        has_runs_in_files=zero_stage > 0,
                    )
                )
    return found


def _stage(facts: Facts, mesh: Mesh, zero_stage: int) -> int:
    """Of ZeRO, for one parameter: 3 leaves whole what is small, a router, or on one rank alone."""
    is_alone = mesh.replicas(of_experts=_is_of_experts(facts, mesh)).size == 1
    return 0 if zero_stage == 3 and (facts.param.is_fp32 or is_alone) else zero_stage


def _is_of_experts(facts: Facts, mesh: Mesh) -> bool:
    return mesh.ep > 1 and "ep" in facts.param.cuts


def frozen_parameters(
    parts: Sequence[nn.Module], facts: Sequence[Mapping[str, Facts]], mesh: Mesh
) -> list[Trained]:
    """What a rank keeps and saves, and no step moves; after `trained_parameters`."""
    return [
        _trained(known[name], tensor, tensor.dtype, mesh, zero_stage=0, has_runs_in_files=False)
        for part, known in zip(parts, facts, strict=True)
        for name, tensor in part.named_parameters()
        if not tensor.requires_grad
    ]


def _trained(
    facts: Facts,
    tensor: nn.Parameter,
    dtype: torch.dtype,
    mesh: Mesh,
    *,
    zero_stage: int,
    has_runs_in_files: bool,
) -> Trained:
    is_of_experts = _is_of_experts(facts, mesh)
    replicas = mesh.replicas(of_experts=is_of_experts)
    count = int(tensor.numel())
    whole, slices = [(0, count)] * replicas.size, runs_of(count, replicas.size)
    is_by_rows = zero_stage == 3
    runs = whole if zero_stage == 0 else slices
    if is_by_rows:
        runs = runs_of_rows(tensor.shape, replicas.size)
    return Trained(
        facts,
        tensor,
        dtype,
        replicas,
        tuple(runs),
        runs[replicas.rank],
        tuple(slices if has_runs_in_files else whole),
        is_counted=facts.is_counted(mesh.tp_rank) and (runs != whole or replicas.rank == 0),
        is_by_rows=is_by_rows,
        is_of_experts=is_of_experts,
        is_first_copy=mesh.tp_rank % facts.copies == 0,
    )
