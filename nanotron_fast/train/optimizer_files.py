"""The states of the optimizer and of the learning rate as Nanotron's files have them.

A file of a rank holds `state`, a group of constants for each parameter, `names`, and under
`gradient_accumulator` the fp32 masters. With ZeRO-0 the first data-parallel rank writes whole
shards, with ZeRO-1 every rank its runs; a parameter of which a rank has no element is in its
`param_groups` alone. Source: serialize/optimizer.py and optim/ in nanotron at 2411b022, and what a
run of it has left.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanotron_fast.errors import CheckpointError
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.optimizer import AdamW, Rate, State
from nanotron_fast.train.zero import Run

OPTIMIZER, LR_SCHEDULER = "optimizer", "lr_scheduler"
OPTIMIZER_CONFIG = "optimizer_config.json"
MASTERS = "gradient_accumulator"
ZERO, PLAIN = "ZeroDistributedOptimizer", "OptimizerFromGradientAccumulator"

_NAME = re.compile(
    r"optimizer_pp-(?P<pp>\d+)-of-(?P<pps>\d+)(_dp-(?P<dp>\d+)-of-(?P<dps>\d+))?"
    r"_tp-(?P<tp>\d+)-of-(?P<tps>\d+)_exp-0-of-1\.pt"
)


@dataclass(frozen=True, slots=True)
class Place:
    """The ranks that a file of the optimizer is of; dp is None for all of them alike."""

    pp: int
    tp: int
    dp: int | None


@dataclass(frozen=True, slots=True)
class Described:
    """What `optimizer_config.json` says of a parameter: the runs and the shape of its shard."""

    name: str
    runs: tuple[Run, ...]
    shape: tuple[int, ...]


def optimizer_path(mesh: Mesh, *, zero_stage: int) -> str:
    """A rank's file, relative to the checkpoint."""
    dp = f"_dp-{mesh.dp_rank}-of-{mesh.dp}" if zero_stage > 0 else ""
    return f"{OPTIMIZER}/optimizer_{_pp(mesh)}{dp}_{_tp(mesh)}_exp-0-of-1.pt"


def lr_scheduler_path(mesh: Mesh) -> str:
    """A rank's file, relative to the checkpoint: data-parallel ranks share it."""
    return f"{LR_SCHEDULER}/lr_scheduler_{_pp(mesh)}_{_tp(mesh)}_exp-0-of-1.pt"


def _pp(mesh: Mesh) -> str:
    return f"pp-{mesh.pp_rank}-of-{mesh.pp}"


def _tp(mesh: Mesh) -> str:
    return f"tp-{mesh.tp_rank}-of-{mesh.tp}"


def optimizer_document(
    optimizer: AdamW, rate: Rate, mesh: Mesh, *, zero_stage: int
) -> dict[str, Any]:
    """What a rank's file holds: copies, on the CPU. With ZeRO every data-parallel rank calls it.

    Args:
        rate: the learning rate of the next step, from a parameter's highest one.
    """
    state: dict[int, dict[str, Tensor]] = {}
    groups: list[dict[str, Any]] = []
    names: dict[int, str] = {}
    masters: dict[str, Tensor] = {}
    steps = float(optimizer.num_steps)
    for each, peak, decay in _numbered(optimizer, mesh):
        index = len(names)
        stored = {
            key: _kept(each.trained.stored(own, mesh))
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


def _numbered(optimizer: AdamW, mesh: Mesh) -> Iterator[tuple[State, float, float]]:
    """The states in a rank's file, in Nanotron's order, with their highest rate and weight decay.

    A parameter that Nanotron has on the first tensor-parallel rank alone is in that one's file.
    """
    for each, (peak, decay) in zip(optimizer.states, optimizer.constants(), strict=True):
        if mesh.tp_rank == 0 or not each.trained.facts.is_row_bias:
            yield each, peak, decay


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def lr_scheduler_document(optimizer: AdamW, rate: Rate, mesh: Mesh) -> dict[str, Any]:
    """What a rank's file of the learning rate holds, as torch's LambdaLR has it."""
    peaks = [peak for _, peak, _ in _numbered(optimizer, mesh)]
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


def config_document(
    described: Sequence[Described], mesh: Mesh, *, zero_stage: int
) -> dict[str, Any]:
    """`optimizer_config.json`, of the parameters of all pipeline stages; numbers are text in it."""
    configs: dict[str, Any] = {}
    if zero_stage > 0:
        configs = {
            "param_name_to_dp_rank_offsets": {
                each.name: {
                    str(rank): [str(first), str(end)]
                    for rank, (first, end) in enumerate(each.runs)
                    if first < end
                }
                for each in described
            },
            "orig_param_shapes": {each.name: [str(n) for n in each.shape] for each in described},
        }
    return {
        "type": ZERO if zero_stage > 0 else PLAIN,
        "parallelism": {
            "tp_size": str(mesh.tp),
            "dp_size": str(mesh.dp),
            "pp_size": str(mesh.pp),
            "expert_parallel_size": "1",
        },
        "configs": configs,
    }


def found_files(folder: Path) -> tuple[dict[Place, Path], dict[str, int]]:
    """The files of a checkpoint's optimizer, and the sizes of the groups that wrote them.

    Raises CheckpointError where there are none, some are missing, or two topologies are mixed.
    """
    files: dict[Place, Path] = {}
    sizes: set[tuple[int, int, int | None]] = set()
    for path in sorted((folder / OPTIMIZER).glob("optimizer_*.pt")):
        match = _NAME.fullmatch(path.name)
        if match is None:
            raise CheckpointError(f"{path}: not a name that Nanotron gives to a rank's optimizer")
        dp = None if match["dp"] is None else int(match["dp"])
        files[Place(int(match["pp"]), int(match["tp"]), dp)] = path
        dps = None if match["dps"] is None else int(match["dps"])
        sizes.add((int(match["pps"]), int(match["tps"]), dps))
    if not files:
        raise CheckpointError(
            f"{folder / OPTIMIZER}: there are no states of an optimizer in it; "
            "checkpoints.load_optimizer=false goes on without them, and model.init_method.path "
            "begins a new run with the weights"
        )
    if len(sizes) > 1:
        raise CheckpointError(f"{folder / OPTIMIZER}: files of two topologies are mixed")
    ((pp, tp, dp_size),) = sizes
    expected = pp * tp * (dp_size or 1)
    if len(files) != expected:
        raise CheckpointError(
            f"{folder / OPTIMIZER}: {len(files)} files of pp={pp} tp={tp}"
            f"{f' dp={dp_size}' if dp_size else ''}, which has {expected}; some are missing"
        )
    return files, {"pp": pp, "tp": tp, "dp": dp_size or 1}
