"""A rank of test_expert_parallel.py: four share out experts, beside one process with all."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from nanotron_fast.checkpoints.inspect import inspect
from nanotron_fast.checkpoints.verify import verify
from nanotron_fast.train.metrics import read_metrics
from tests.parallel.ranks import join, run_cases
from tests.train import runs

STEPS, SAMPLES = 3, 4
# Far from 0, so that what differs by rounding alone is stepped alike.
EPS = 1e-3
# dp, tp, pp, ep; what else.
CASES: dict[str, tuple[tuple[int, int, int, int], dict[str, Any]]] = {
    "ep=2, zero 1": ((4, 1, 1, 2), {"zero_stage": 1}),
    "ep=2, zero 3": ((4, 1, 1, 2), {"zero_stage": 3, "recompute_layer": True}),
    "ep=4, zero 3": ((4, 1, 1, 4), {"zero_stage": 3}),
    "tp=2, ep=2, zero 0": ((2, 2, 1, 2), {}),
    "tp=2, ep=2, scattered": ((2, 2, 1, 2), {"tp_mode": "REDUCE_SCATTER", "zero_stage": 1}),
    "pp=2, ep=2": ((2, 1, 2, 2), {"zero_stage": 1, "pp_engine": "1f1b"}),
    "ep=2, muon": ((4, 1, 1, 2), {"zero_stage": 1, "is_muon": True}),
}


# At the same topology, and at others.
RESUMED = [
    ("ep=2, zero 1", "ep=2, zero 1"),
    ("tp=2, ep=2, zero 0", "ep=4, zero 3"),
]


def train(
    root: Path,
    hf: Path,
    sizes: tuple[int, int, int, int] = (1, 1, 1, 1),
    *,
    zero_stage: int = 0,
    is_muon: bool = False,
    changes: Any = None,
    **layout: Any,
) -> None:
    """Three steps on the same samples at any topology, and a checkpoint."""
    dp, tp, pp, ep = sizes
    factory: dict[str, Any] = {"adam_eps": EPS, "adam_beta1": 0.9, "adam_beta2": 0.95}
    factory |= {"torch_adam_is_fused": True, "name": "muon" if is_muon else "adamW"}
    options = {
        "parallelism": {"dp": dp, "tp": tp, "pp": pp, "expert_parallel_size": ep, **layout},
        "model": {"init_method": {"path": str(hf)}, "dtype": "float32"},
        "tokens__train_steps": STEPS,
        "tokens__micro_batch_size": 1,
        "tokens__batch_accumulation_per_replica": SAMPLES // dp,
        "optimizer__zero_stage": zero_stage,
        "optimizer__optimizer_factory": factory,
        "optimizer__clip_grad": 0.5,
        "optimizer__learning_rate_scheduler": {"learning_rate": 1e-2},
        "optimizer__router_bias_rate": 0.01,
        "checkpoints__checkpoint_interval": STEPS,
        "checkpoints__export_hf": True,
        "data_stages": [
            {"name": "one", "start_training_step": 1, "data": {"dataset": None, "seed": 3}}
        ],
    }
    runs.train(root, **{**options, **(changes or {})})


def check_same(run: Path, other: Path, what: str) -> None:
    """Figures and weights of two runs, but for the order of sums."""
    for ours, theirs in zip(
        read_metrics(run / "metrics.jsonl"), read_metrics(other / "metrics.jsonl"), strict=True
    ):
        for key in ("loss", "grad_norm"):
            error = abs(ours[key] - theirs[key]) / theirs[key]
            assert error <= 1e-5, f"{what}: {key} of step {ours['step']}: {error:.1e}"
    folders = (run / str(STEPS) / "hf", other / str(STEPS) / "hf")
    one, two = (load_file(folder / "model.safetensors") for folder in folders)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        error = (tensor - two[name]).abs().max().item()
        assert error <= 2e-6, f"{what}: {name}: {error:.1e}"


def trains_alike(root: Path, name: str) -> None:
    sizes, options = CASES[name]
    run = root / name
    # Those that are gone on with have a checkpoint before the last too.
    is_kept = name in [first for first, _ in RESUMED]
    changes = {"checkpoints__checkpoint_interval": STEPS - 1} if is_kept else {}
    train(run, root / "hf", sizes, **options, changes=changes)
    if dist.get_rank() == 0:
        is_muon = options.get("is_muon", False)
        check_same(run, root / ("muon" if is_muon else "one"), name)
        last = run / str(STEPS)
        assert inspect(last).topology.ep == sizes[3]
        assert verify(last, last / "hf").equal
        written = json.loads((last / "optimizer" / "optimizer_config.json").read_text())
        assert written["parallelism"]["expert_parallel_size"] == str(sizes[3])
    dist.barrier()


def goes_on(root: Path, name: str, other: str) -> None:
    """From the checkpoint before the last: bit for bit where nothing is changed."""
    sizes, options = CASES[other]
    again = root / f"{name} then {other}"
    resumed = {"checkpoints__resume_checkpoint_path": str(root / name / str(STEPS - 1))}
    train(again, root / "hf", sizes, **options, changes=resumed)
    if dist.get_rank() == 0:
        ours, theirs = again / str(STEPS), root / name / str(STEPS)
        if name == other:
            paths = [path.relative_to(theirs) for path in theirs.rglob("*.safetensors")]
            for path in paths:
                assert (ours / path).read_bytes() == (theirs / path).read_bytes(), path
            paths = [path.relative_to(theirs) for path in theirs.glob("optimizer/*.pt")]
            for path in paths:
                check_equal(torch.load(ours / path), torch.load(theirs / path), str(path))
        else:
            one, two = (load_file(each / "hf" / "model.safetensors") for each in (ours, theirs))
            for key, tensor in one.items():
                error = (tensor - two[key]).abs().max().item()
                assert error <= 2e-6, f"{again.name}: {key}: {error:.1e}"
    dist.barrier()


def check_equal(ours: Any, theirs: Any, where: str) -> None:
    """Documents that torch.save wrote, value for value."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in theirs.items():
            check_equal(ours[key], value, f"{where} {key}")
    elif isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def cases(root: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    for name in CASES:
        yield name, partial(trains_alike, root, name)
    for name, other in RESUMED:
        yield f"{name} then {other}", partial(goes_on, root, name, other)


if __name__ == "__main__":
    torch.set_num_threads(1)
    join()
    run_cases(cases(Path(sys.argv[1])))
