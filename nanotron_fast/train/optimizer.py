"""AdamW on fp32 masters of this rank's runs, and the low-precision parameters from them.

A parameter in fp32 is its own master. One in bf16 has a master beside it, whose rounding it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanotron_fast.kernels.optimizer import adamw_step_
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.parameters import Trained
from nanotron_fast.train.zero import gather_runs

Rate = Callable[[float], float]
# By the names that torch and Nanotron give to them, in files too.
ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class State:
    """What the optimizer keeps of one parameter's run: flat, fp32, each as long as the run.

    Args:
        moments: by the names that they have in files.
    """

    trained: Trained
    master: Tensor
    moments: dict[str, Tensor]


@dataclass(slots=True, eq=False)
class Group:
    """Parameters that are stepped alike.

    Args:
        peak: their highest learning rate.
        moments: what is kept of each.
        step: how many were taken; fp32, 0-d.
        places: of the parameters among all.
        counters: copies of `step` that a launch counts up, where they always were: its tables have
            their addresses.
    """

    peak: float
    weight_decay: float
    moments: tuple[str, ...]
    step: Tensor
    places: list[int] = field(default_factory=list)
    counters: dict[bool, Tensor] = field(default_factory=dict)

    def counter(self, has_copy: bool) -> Tensor:
        """The count of steps, for those of its parameters that have a copy, or for the others."""
        if has_copy not in self.counters:
            self.counters[has_copy] = torch.empty_like(self.step)
        return self.counters[has_copy].copy_(self.step)


class AdamW:
    """The optimizer of a rank.

    Args:
        trained: the parameters, with their values: masters are made from them here.
        learning_rate: at its highest.
        peaks: of parameters that have another one, by name.
        betas, eps: of AdamW.
        weight_decay: of every parameter that no pattern excludes.
        excluded: regular expressions that match the beginning of a name.
        zero_stage: with 1 a parameter is made whole after the step; with 3 when it is needed.
    """

    def __init__(
        self,
        trained: Sequence[Trained],
        mesh: Mesh,
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        excluded: Sequence[str] = (),
        peaks: Mapping[str, float] | None = None,
        zero_stage: int = 0,
    ) -> None:
        self.betas, self.eps = betas, eps
        self._mesh, self._zero_stage = mesh, zero_stage
        self.states = [_new_state(each, self.moments_of(each)) for each in trained]
        self._groups: dict[tuple[float, float, tuple[str, ...]], Group] = {}
        for place, each in enumerate(trained):
            peak = (peaks or {}).get(each.name, learning_rate)
            decay = weight_decay if each.is_decayed(excluded) else 0.0
            key = peak, decay, self.moments_of(each)
            if key not in self._groups:
                step = torch.zeros((), dtype=torch.float32, device=mesh.device)
                self._groups[key] = Group(*key, step)
            self._groups[key].places.append(place)

    def moments_of(self, trained: Trained) -> tuple[str, ...]:
        """What is kept of a parameter beside its master."""
        return ADAMW_MOMENTS

    def options_of(self, trained: Trained) -> dict[str, Any]:
        """How a parameter is stepped, in torch's words, its learning rate and decay left out."""
        return {
            "betas": self.betas,
            "eps": self.eps,
            "amsgrad": False,
            "maximize": False,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": True,
            "decoupled_weight_decay": True,
        }

    @property
    def num_steps(self) -> int:
        """Steps that were taken. Waits for the device."""
        return max((int(group.step.item()) for group in self._groups.values()), default=0)

    @num_steps.setter
    def num_steps(self, steps: int) -> None:
        for group in self._groups.values():
            group.step.fill_(steps)

    def constants(self) -> list[tuple[float, float]]:
        """The highest learning rate and the weight decay of each parameter, in their order."""
        found = [(0.0, 0.0)] * len(self.states)
        for group in self._groups.values():
            for place in group.places:
                found[place] = group.peak, group.weight_decay
        return found

    @torch.no_grad()
    def step(self, shares: Sequence[Tensor], rate: Rate, scale: Tensor | None = None) -> None:
        """Steps every parameter, and makes it whole again on every rank.

        Args:
            shares: this rank's run of each gradient, flat and in fp32. They may be written to.
            rate: the learning rate of this step, from the highest one.
            scale: 0-d; gradients are multiplied by it.
        """
        shares = list(shares)
        if scale is not None and not scale.is_cuda:
            # In one pass here: torch's fused step would not take gradients and a scale as they are.
            multiply_(shares, scale)
            scale = None
        for group in self._groups.values():
            self._step_group(group, shares, rate(group.peak), scale)
            # The counter of a group counts once, whichever lists it is cut into.
            group.step.add_(1)
        if self._zero_stage == 1 and self._mesh.dp > 1:
            self._gather()

    def _step_group(
        self, group: Group, shares: list[Tensor], lr: float, scale: Tensor | None
    ) -> None:
        """Steps this rank's runs of a group, whose gradients are still to be scaled, or not."""
        inverse = None if scale is None else scale.reciprocal()
        by_copy: dict[bool, list[tuple[State, Tensor]]] = {}
        for place in group.places:
            state = self.states[place]
            if state.master.numel():
                has_copy = state.trained.tensor.dtype != torch.float32
                by_copy.setdefault(has_copy, []).append((state, shares[place]))
        for has_copy, members in by_copy.items():
            states = [state for state, _ in members]
            adamw_step_(
                [state.master for state in states],
                [share for _, share in members],
                *([state.moments[key] for state in states] for key in ADAMW_MOMENTS),
                group.counter(has_copy),
                lr=lr,
                betas=self.betas,
                eps=self.eps,
                weight_decay=group.weight_decay,
                copies=[own_run(state.trained) for state in states] if has_copy else None,
                grad_scale=inverse,
            )

    def _gather(self) -> None:
        for of_experts in (False, True):
            group = self._mesh.replicas(of_experts=of_experts).group
            tensors = [
                state.trained.tensor.detach()
                for state in self.states
                if state.trained.is_of_experts is of_experts
            ]
            if group is not None and tensors:
                gather_runs(tensors, group)


def multiply_(shares: Iterable[Tensor], scale: Tensor) -> None:
    """Multiplies gradients in place."""
    filled = [share for share in shares if share.numel()]
    if filled:
        torch._foreach_mul_(filled, scale)


def own_run(trained: Trained) -> Tensor:
    """This rank's run of a parameter, to be written to."""
    return trained.share(trained.tensor.detach())


def _new_state(trained: Trained, moments: Iterable[str]) -> State:
    own = own_run(trained)
    master = own if own.dtype == torch.float32 else own.float()
    return State(trained, master, {key: torch.zeros_like(master) for key in moments})
