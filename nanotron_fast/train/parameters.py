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
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.sharded import runs_of_rows, shard
from nanotron_fast.train.zero import gathered


@dataclass(frozen=True, slots=True)
class Trained:
    """One parameter of this rank.

    Args:
        facts: what the model says of it.
        tensor: its values, contiguous; with ZeRO-3 a DTensor, of which a rank has its run alone.
        dtype: of the values that products see.
        runs: of each data-parallel rank, which elements it keeps the optimizer's states of: with
            ZeRO-0 all of them, on every rank.
        run: that of this rank.
        stored_runs: of each data-parallel rank, which elements its files have.
        is_counted: this rank's gradient belongs into the norm over all ranks.
        is_by_rows: no rank has more of it than its run.
    """

    facts: Facts
    tensor: nn.Parameter
    dtype: torch.dtype
    runs: tuple[Run, ...]
    run: Run
    stored_runs: tuple[Run, ...]
    is_counted: bool
    is_by_rows: bool = False

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

    def values(self, mesh: Mesh) -> Tensor:
        """All values that products see. Where `is_by_rows`, all data-parallel ranks call it."""
        values = self.tensor.detach()
        if not self.is_by_rows:
            return values
        own = self.share(values).to(self.dtype)
        return gathered(own, self.runs, mesh.dp_group).view(self.tensor.shape)

    def stored(self, own: Tensor, mesh: Mesh) -> Tensor:
        """What this rank's files have of a state of which it keeps its run: flat.

        All data-parallel ranks call it.
        """
        if self.runs == self.stored_runs:
            return own
        if self.is_by_rows:
            own = gathered(own, self.runs, mesh.dp_group)
        first, end = self.stored_runs[mesh.dp_rank]
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
    is_by_rows = zero_stage == 3 and mesh.dp > 1
    found = []
    for part, known in zip(parts, facts, strict=True):
        dtypes = {name: tensor.dtype for name, tensor in part.named_parameters()}
        if is_by_rows:
            assert isinstance(part, Decoder)
            # A router, which is small.
            whole = {name for name, fact in known.items() if fact.param.is_fp32}
            shard(part, mesh, whole=whole)
        for name, tensor in part.named_parameters():
            if tensor.requires_grad:
                fact = known[name]
                is_kept_whole = zero_stage == 0 or (is_by_rows and fact.param.is_fp32)
                found.append(
                    _trained(
                        fact,
                        tensor,
                        dtypes[name],
                        mesh,
                        zero_stage=0 if is_kept_whole else zero_stage,
                        has_runs_in_files=zero_stage > 0,
                    )
                )
    return found


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
    count, dp = int(tensor.numel()), mesh.dp
    whole, slices = [(0, count)] * dp, runs_of(count, dp)
    is_by_rows = zero_stage == 3 and dp > 1
    runs = whole if zero_stage == 0 else slices
    if is_by_rows:
        runs = runs_of_rows(tensor.shape, dp)
    return Trained(
        facts,
        tensor,
        dtype,
        tuple(runs),
        runs[mesh.dp_rank],
        tuple(slices if has_runs_in_files else whole),
        is_counted=facts.is_counted(mesh.tp_rank) and (runs != whole or mesh.dp_rank == 0),
        is_by_rows=is_by_rows,
    )
