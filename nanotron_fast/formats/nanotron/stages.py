"""Which pipeline stage owns what, as Nanotron decides it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nanotron_fast.errors import TopologyError
from nanotron_fast.formats.nanotron.classes import NanotronClass
from nanotron_fast.model.spec import ModelSpec
from nanotron_fast.model.topology import Topology, assign_stages


class Stages:
    """The pipeline stage of every block of a model. Raises TopologyError on an empty stage."""

    def __init__(self, spec: ModelSpec, model_class: NanotronClass, topology: Topology) -> None:
        self._of = spec, model_class, topology
        stages = assign_stages(block_costs(spec, model_class), topology.pp)
        used = max(stages) + 1
        if used < topology.pp:
            last = topology.pp - 1
            empty = f"stage {used}" if used == last else f"stages {used} to {last}"
            raise TopologyError(
                f"pp={topology.pp}: {spec.num_layers} layers fill {used} stages by Nanotron's own "
                f"assignment, so {empty} would own no block"
            )
        self.layers = tuple(stages[1 : 1 + spec.num_layers])
        cast = {"cast": stages[-2]} if model_class.casts_to_fp32 else {}
        # What is no layer: what has parameters, then the cast of logits to fp32 and the loss.
        self.others: Mapping[str, int] = {
            "embedding": stages[0],
            "norm": stages[1 + spec.num_layers],
            "head": stages[2 + spec.num_layers],
            **cast,
            "loss": stages[-1],
        }

    @property
    def without_parameters(self) -> list[int]:
        """The stages at the end that have the cast of logits, or the loss, alone."""
        first = 1 + max(*self.layers, *(self.others[block] for block in ("norm", "head")))
        return list(range(first, self._of[2].pp))

    def warnings(self) -> list[str]:
        """What to tell of stages without parameters."""
        idle = self.without_parameters
        if not idle:
            return []
        spec, model_class, topology = self._of
        pp = next(
            pp
            for pp in range(topology.pp - 1, 0, -1)
            if not Stages(spec, model_class, replace(topology, pp=pp)).without_parameters
        )
        which = f"stage {idle[0]}" if len(idle) == 1 else f"stages {idle[0]} to {idle[-1]}"
        return [
            f"pp={topology.pp}: {which} would have no parameters, by Nanotron's own assignment. "
            "nanotron-fast train refuses that, and so does Nanotron at dp > 1 without ZeRO-1; with "
            f"pp={pp} every stage has some"
        ]

    def of(self, block: int | str) -> int:
        """The stage of a decoder layer, or of "embedding", "norm" or "head"."""
        return self.layers[block] if isinstance(block, int) else self.others[block]


def block_costs(spec: ModelSpec, model_class: NanotronClass) -> list[int]:
    """Compute costs of Nanotron's pipeline blocks in order, by which it assigns stages.

    Embedding, norm, cast to fp32 and loss count nothing.
    """
    layers = [model_class.layer_cost(spec, layer) for layer in spec.layers]
    tail = [0, 0] if model_class.casts_to_fp32 else [0]
    return [0, *layers, 0, spec.vocab_size * spec.hidden_size, *tail]
