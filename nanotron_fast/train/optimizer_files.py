"""The states of the optimizer and of the learning rate as Nanotron's files have them.

What the files are called and what they hold is in `formats/nanotron/optimizer.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nanotron_fast.formats.nanotron.optimizer import MASTERS, Place, Sizes
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.optimizer import AdamW, Rate, State


def sizes_of(mesh: Mesh, *, zero_stage: int) -> Sizes:
    """The ranks, as files tell of them: with any ZeRO they have runs of the states."""
    return Sizes(mesh.tp, mesh.pp, mesh.dp, zero_stage=min(zero_stage, 1), ep=mesh.ep)


def place_of(mesh: Mesh, *, zero_stage: int) -> Place:
    """This rank, as its file of the optimizer tells of it."""
    dp_rank = mesh.dp_rank if zero_stage > 0 else None
    return Place(mesh.pp_rank, mesh.tp_rank, dp_rank, mesh.ep_rank)


def optimizer_document(
    optimizer: AdamW, rate: Rate, mesh: Mesh, *, zero_stage: int
) -> dict[str, Any]:
    """What a rank's file holds: copies, on the CPU. With ZeRO every data-parallel rank calls it,
    and else the first of those that have the same experts.

    Args:
        rate: the learning rate of the next step, from a parameter's highest one.
    """
    state: dict[int, dict[str, Tensor]] = {}
    groups: list[dict[str, Any]] = []
    names: dict[int, str] = {}
    masters: dict[str, Tensor] = {}
    steps = float(optimizer.num_steps)
    for each, peak, decay in _numbered(optimizer, mesh, zero_stage):
        index = len(names)
        stored = {
            key: _kept(each.trained.stored(own))
            for key, own in {**each.moments, MASTERS: each.master}.items()
        }
        is_here = stored[MASTERS].numel() > 0
        groups.append(
            {
                "lr": rate(peak),
                "weight_decay": decay,
                **optimizer.options_of(each.trained),
                "initial_lr": peak,
                "params": [index] if is_here else [],
            }
        )
        if not is_here:
            continue
        if zero_stage == 0:
            shape = each.trained.tensor.shape
            stored = {key: tensor.view(shape) for key, tensor in stored.items()}
        masters[each.trained.name] = stored.pop(MASTERS)
        names[index] = each.trained.name
        state[index] = {
            "step": torch.tensor(steps, dtype=torch.float32),
            **stored,
        }
    return {"state": state, "param_groups": groups, "names": names, MASTERS: masters}


def _numbered(
    optimizer: AdamW, mesh: Mesh, zero_stage: int
) -> Iterator[tuple[State, float, float]]:
    """The states in a rank's file, in Nanotron's order, with their highest rate and weight decay.

    A parameter that Nanotron has on the first tensor-parallel rank alone is in that one's file.
    Where experts are split over ranks, and each of these has whole states, what is not split is in
    the file of the first.
    """
    is_experts_alone = zero_stage == 0 and mesh.ep_rank > 0
    for each, (peak, decay) in zip(optimizer.states, optimizer.constants(), strict=True):
        is_elsewhere = mesh.tp_rank > 0 and each.trained.facts.is_row_bias
        if not is_elsewhere and (each.trained.is_of_experts or not is_experts_alone):
            yield each, peak, decay


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def lr_scheduler_document(
    optimizer: AdamW, rate: Rate, mesh: Mesh, *, zero_stage: int
) -> dict[str, Any]:
    """What a rank's file of the learning rate holds, as torch's LambdaLR has it."""
    peaks = [peak for _, peak, _ in _numbered(optimizer, mesh, zero_stage)]
    steps = optimizer.num_steps
    return {
        "base_lrs": peaks,
        "last_epoch": steps,
        "_step_count": steps + 1,
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "_last_lr": [rate(peak) for peak in peaks],
        "lr_lambdas": [{} for _ in peaks],
    }
