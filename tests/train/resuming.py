"""Saving runs of tests/train/engine.py, and going on from there at any topology."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from nanotron_fast.checkpoints.processes import Processes, TorchProcesses
from nanotron_fast.checkpoints.reshard import reshard
from nanotron_fast.families.roles import is_hidden_matrix
from nanotron_fast.train.checkpoint import Beside, metadata_document, save, snapshot
from nanotron_fast.train.muon import MOMENTUM
from nanotron_fast.train.optimizer import ADAMW_MOMENTS
from nanotron_fast.train.optimizer_files import MASTERS
from nanotron_fast.train.optimizer_states import StoredStates, load_states
from tests.train.engine import NUM_LAYERS, Case, Run, expected_of, rate

SAVED, END = 3, 6


def save_run(run: Run, root: Path, step: int) -> Path:
    zero = run.case.zero
    taken = snapshot(
        run.trained, (), run.optimizer, run.mesh, lambda peak: rate(step, peak), zero_stage=zero
    )
    model = run.architecture
    config = model.model_class.write(
        model.spec, family=model.family.name, version="1.5", rope_interleaved=False
    )
    stage = {
        "name": "only",
        "sequence_length": 16,
        "start_training_step": 1,
        "consumed_train_samples": 8 * step,
        "consumed_tokens_per_dataset_folder": {},
    }
    return save(
        root,
        step,
        taken,
        Processes() if run.mesh.world is None else TorchProcesses(),
        beside=Beside({"model_config.json": json.dumps(config).encode()}),
        metadata=metadata_document(run.mesh, step=step, stages=[stage], last_stage=0),
        fsync=False,
    )


def resumed(case: Case, folder: Path) -> Run:
    run = Run(case, folder)
    load_states(folder, run.optimizer, run.mesh)
    return run


def values_of(run: Run) -> dict[str, Tensor]:
    found = {}
    for state in run.optimizer.states:
        name = state.trained.facts.name
        found[name] = state.trained.values().clone()
        for key, value in {"master": state.master, **state.moments}.items():
            found[f"{name} {key}"] = value.clone()
    return found


def check_resume(case: Case, others: list[Case], root: Path) -> None:
    """A straight run, the same in two halves, and second halves at other topologies.

    `root` is the same folder on every rank.
    """
    straight = Run(case)
    straight.steps(0, SAVED)
    folder = save_run(straight, root / "first", SAVED)
    rest = straight.steps(SAVED, END)

    run = resumed(case, folder)
    assert run.optimizer.num_steps == SAVED
    assert run.steps(SAVED, END) == rest, case
    wanted = values_of(straight)
    for name, value in values_of(run).items():
        assert torch.equal(value, wanted[name]), f"{case}: {name}"

    for number, other in enumerate(others):
        same = ("is_tied", "dtype", "is_muon", "kv_heads", "vocab")
        alike = replace(other, **{name: getattr(case, name) for name in same})
        run = resumed(alike, folder)
        check_resharded(run, folder, root / f"resharded-{number}")
        again = save_run(run, root / f"other-{number}", SAVED)
        check_same_states(run, folder, again)
        if case.dtype == torch.float32:
            losses = expected_of(case)[0][SAVED:END]
            for ours, theirs in zip(run.steps(SAVED, END), losses, strict=True):
                assert abs(ours[0] - theirs[0]) <= 1e-5 * theirs[0], other


def check_resharded(run: Run, folder: Path, root: Path) -> None:
    """What a run has resumed is what it resumes from the checkpoint resharded to its ranks."""
    case, values = run.case, values_of(run)
    if run.mesh.rank == 0:
        reshard(
            folder,
            root,
            tp=case.tp,
            pp=case.pp,
            dp=case.dp,
            zero_stage=min(case.zero, 1),
            workers=1,
        )
    if run.mesh.world is not None:
        dist.barrier()
    again = resumed(case, root)
    assert again.optimizer.num_steps == run.optimizer.num_steps
    for name, value in values_of(again).items():
        assert torch.equal(value, values[name]), f"{case}: {name}"


def check_there_and_back(case: Case, root: Path) -> None:
    """What `check_resume` has saved to `root`, resharded to one rank and back: the same files."""
    folder = root / "first" / str(SAVED)
    if dist.get_rank() == 0:
        one, again = root / "one", root / "again"
        reshard(folder, one, tp=1, dp=1, zero_stage=0, workers=1)
        sizes = {"tp": case.tp, "pp": case.pp, "dp": case.dp, "zero_stage": min(case.zero, 1)}
        reshard(one, again, **sizes, workers=1)
        reshard(folder, root / "as it was", **sizes, workers=1)
        files = sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
        tensors = [path for path in files if path.suffix in (".safetensors", ".pt")]
        assert len(tensors) > 4 * NUM_LAYERS
        for path in tensors:
            wanted = (root / "as it was" / path).read_bytes()
            assert (again / path).read_bytes() == wanted, path
            if path.suffix == ".safetensors":
                assert (folder / path).read_bytes() == wanted, path
    dist.barrier()


def check_same_states(run: Run, one: Path, other: Path) -> None:
    """Whole tensors of two checkpoints, element for element."""
    first, second = StoredStates(one), StoredStates(other)
    assert first.num_steps() == second.num_steps() == SAVED
    params = run.architecture.params()
    for param in params:
        is_muon = run.case.is_muon and is_hidden_matrix(param)
        for key in (*((MOMENTUM,) if is_muon else ADAMW_MOMENTS), MASTERS):
            whole = [
                each.share(
                    param.name,
                    key,
                    param,
                    tp=1,
                    tp_rank=0,
                    run=(0, torch.Size(param.shape).numel()),
                )
                for each in (first, second)
            ]
            assert all(each is not None for each in whole)
            assert torch.equal(*whole), f"{key} of {param.name}"


def check_folder(root: Path) -> None:
    """What is left of saves: checkpoints alone."""
    assert sorted(os.listdir(root)) == [str(SAVED), "latest.txt"], os.listdir(root)
    assert (root / "latest.txt").read_text() == str(SAVED)
