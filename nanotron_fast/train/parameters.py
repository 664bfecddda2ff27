"""The parameters that a rank trains, each with what the optimizer has to know of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from nanotron_fast.models.facts import Facts
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.zero import Run, runs_of


@dataclass(frozen=True, slots=True)
class Trained:
    """One parameter of this rank.

    Args:
        facts: what the model says of it.
        tensor: its values, contiguous.
        runs: of each data-parallel rank, which elements it keeps the optimizer's states of: with
            ZeRO-0 all of them, on every rank.
        run: that of this rank.
        is_counted: this rank's gradient belongs into the norm over all ranks.
    """

    facts: Facts
    tensor: nn.Parameter
    runs: tuple[Run, ...]
    run: Run
    is_counted: bool

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
        """This rank's run of a tensor of the parameter's shape: a view, flat."""
        first, end = self.run
        return tensor.view(-1)[first:end]


def trained_parameters(
    parts: Sequence[nn.Module],
    facts: Sequence[Mapping[str, Facts]],
    mesh: Mesh,
    *,
    zero_stage: int,
) -> list[Trained]:
    """What a rank trains, in the order of its modules.

    Args:
        parts: the modules of this rank.
        facts: of each of them, of all its parameters.
        zero_stage: 1 shares the optimizer's states out over data-parallel ranks; 0 does not.
    """
    found = []
    for part, known in zip(parts, facts, strict=True):
        for name, tensor in part.named_parameters():
            if not tensor.requires_grad:
                continue
            count = int(tensor.numel())
            is_shared_out = zero_stage > 0 and mesh.dp > 1
            runs = runs_of(count, mesh.dp) if is_shared_out else [(0, count)] * mesh.dp
            fact = known[name]
            is_counted = fact.is_counted(mesh.tp_rank) and (is_shared_out or mesh.dp_rank == 0)
            found.append(Trained(fact, tensor, tuple(runs), runs[mesh.dp_rank], is_counted))
    return found
