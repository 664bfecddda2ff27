"""Where the parameters of a block live: a module for each, under Nanotron's names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from nanotron_fast.kernels.runtime.collectives import Group, Ranks, resolve
from nanotron_fast.model.spec import ModelSpec
from nanotron_fast.models.names import Names
from nanotron_fast.models.rotary import Rotary


class Weights(nn.Module):
    """A weight, which a function of the block takes. Filled from the family's table.

    With `may_have_bias` there is a bias where the table has one; else the table may have none.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, *, may_have_bias: bool = False) -> None:
        super().__init__()
        self.register_parameter("weight", None)
        if may_have_bias:
            self.register_parameter("bias", None)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={list(parameter.shape)}" for name, parameter in self.named_parameters()
        )


@dataclass(frozen=True)
class Setting:
    """What all modules of a decoder are told when they are made.

    Args:
        group: of tensor parallelism.
        mode: "all_reduce" or "reduce_scatter", see `nanotron_fast.parallel`.
        interleaved: rotary pairs lie beside each other.
        recompute: the products of a block are computed again in backward.
        names: of the modules that have parameters.
        expert_group: of the ranks that the experts of a layer are split over.
    """

    spec: ModelSpec
    rotary: Rotary
    group: Group
    mode: str
    interleaved: bool
    recompute: bool
    names: Names
    expert_group: Group = None

    @property
    def ranks(self) -> Ranks:
        return resolve(self.group)

    @property
    def expert_ranks(self) -> Ranks:
        return resolve(self.expert_group)

    @property
    def is_scattered(self) -> bool:
        """Whether this rank has a share of the tokens between the blocks."""
        return self.mode == "reduce_scatter" and self.ranks.size > 1


def place(
    root: nn.Module,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    is_frozen: bool = False,
) -> None:
    """Puts an empty parameter on the meta device where its name says.

    Raises AttributeError where no module is there, or the module has no such parameter.
    """
    path, _, last = name.rpartition(".")
    owner = root.get_submodule(path)
    if last not in owner._parameters:
        raise AttributeError(f"{name}: no module computes with it")
    empty = torch.empty(shape, dtype=dtype, device="meta")
    parameter = nn.Parameter(empty, requires_grad=not is_frozen)
    owner.register_parameter(last, parameter)
