"""How many ranks there are, and which pipeline stage owns which block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanotron_fast.errors import TopologyError


@dataclass(frozen=True, slots=True)
class Topology:
    """Sizes of the tensor-, pipeline- and expert-parallel groups."""

    tp: int = 1
    pp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name, size in (("tp", self.tp), ("pp", self.pp), ("ep", self.ep)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise TopologyError(f"{name}={size!r}: a group has at least one rank")

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis that may cut a parameter."""
        return {"tp": self.tp, "ep": self.ep}

    def __str__(self) -> str:
        experts = f" EP={self.ep}" if self.ep > 1 else ""
        return f"TP={self.tp} PP={self.pp}{experts}"


def topology_wanted(given: object) -> str:
    """What to say to something else than a Topology."""
    numbers: list[object] = list(given) if isinstance(given, tuple | list) else []
    tp, pp, *_ = [*numbers[:2], "...", "..."]
    return (
        f"topology is {given!r}, a {type(given).__name__}: give "
        f"nanotron_fast.Topology(tp={tp}, pp={pp})"
    )


def assign_stages(costs: Sequence[int], pp: int) -> list[int]:
    """Nanotron's pipeline stage of each block, from the blocks' compute costs in order.

    A block goes to the current stage; when the running cost then exceeds that stage's share of the
    total, the next block starts the next stage. So the block that crosses stays on the earlier
    stage, free blocks can advance too, and stages at the end may stay empty.

    Source: build_model in nanotron/models/base.py at 2411b022. The comparison is in floating
    point there, so it is here.
    """
    total = sum(costs)
    stages: list[int] = []
    stage = 0
    running = 0
    for cost in costs:
        running += cost
        stages.append(stage)
        if running > total * ((stage + 1) / pp):
            stage += 1
    return stages
