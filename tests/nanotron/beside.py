"""Runs of real Nanotron's trainer and of ours, from the same checkpoint, file and batches."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from nanotron_fast.formats.nanotron.optimizer import optimizer_path
from nanotron_fast.patch.cpu import cpu_mode
from nanotron_fast.train import Trainer, TrainingConfig
from nanotron_fast.train import trainer as our_trainer
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.optimizer import AdamW
from nanotron_fast.train.optimizer_files import optimizer_document, place_of, sizes_of
from nanotron_fast.train.optimizer_states import load_states
from tests.nanotron.training import BATCH, SEQUENCE, VOCABULARY

STEPS, SAVED = 10, 5
ACCUMULATION = 2
# Loss and norm of the gradient of each step.
Figures = dict[int, tuple[float, float]]


@dataclass(frozen=True)
class Grid:
    """Ranks, and how they train.

    Args:
        tolerance: relative, of losses and norms.
    """

    family: str = "llama"
    dp: int = 1
    pp: int = 1
    tp: int = 1
    engine: str = "1f1b"
    mode: str = "ALL_REDUCE"
    zero_stage: int = 0
    is_tied: bool = False
    dtype: str = "float32"
    recomputes: bool = False
    tolerance: float = 1e-6

    @property
    def size(self) -> int:
        return self.dp * self.pp * self.tp

    def __str__(self) -> str:
        """What is not as in the plainest."""
        plain = vars(Grid())
        changed = [f"{key}-{value}" for key, value in vars(self).items() if value != plain[key]]
        return "-".join(changed) or "plain"


def is_main() -> bool:
    return importlib.util.find_spec("nanotron.data") is not None


def document(grid: Grid, weights: Path, checkpoints: Path, resume: Path | None) -> dict[str, Any]:
    """The configuration, as the installed Nanotron has it: main and the released 0.4 differ."""
    adam = {"adam_eps": 1e-8, "adam_beta1": 0.9, "adam_beta2": 0.95, "torch_adam_is_fused": True}
    data = {"dataset": None, "num_loading_workers": 0, "seed": 42}
    model_config = json.loads((weights / "model_config.json").read_text())
    parts: dict[str, Any] = {
        "general": {"project": "tests", "run": "cpu", "seed": 42, "ignore_sanity_checks": True},
        "checkpoints": {
            "checkpoint_interval": SAVED,
            "checkpoints_path": str(checkpoints),
            "checkpoints_path_is_shared_file_system": True,
            "resume_checkpoint_path": None if resume is None else str(resume),
            "save_initial_state": False,
        },
        "parallelism": {
            "dp": grid.dp,
            "pp": grid.pp,
            "tp": grid.tp,
            "pp_engine": grid.engine,
            "tp_mode": grid.mode,
            # Without it main's column linear fails at tp=1, and with it 0.4's row linear at tp=2.
            "tp_linear_async_communication": is_main() and grid.mode == "REDUCE_SCATTER",
            "expert_parallel_size": 1,
        },
        "model": {
            "dtype": grid.dtype,
            "init_method": {"path": str(weights)},
            "model_config": model_config,
        },
        "tokenizer": {"tokenizer_name_or_path": None},
        "optimizer": {
            "zero_stage": grid.zero_stage,
            "weight_decay": 0.1,
            "clip_grad": 0.2,
            # Nanotron refuses to accumulate gradients in fp32 beside parameters in fp32.
            "accumulate_grad_in_fp32": grid.dtype != "float32",
            "learning_rate_scheduler": {
                "learning_rate": 3e-3,
                "lr_warmup_steps": 2,
                "lr_warmup_style": "linear",
                "lr_decay_style": "cosine",
                "lr_decay_steps": 10,
                "min_decay_lr": 0 if is_main() else 1e-4,
            },
        },
        "logging": {"log_level": "error", "log_level_replica": "error"},
        "tokens": {
            "sequence_length": SEQUENCE,
            "train_steps": STEPS,
            "micro_batch_size": BATCH,
            "batch_accumulation_per_replica": ACCUMULATION,
        },
    }
    if is_main():
        parts["optimizer"]["optimizer_factory"] = {**adam, "name": "adamW"}
        parts["data_stages"] = [{"name": "all", "start_training_step": 1, "data": data}]
        if grid.is_tied:
            # Main excludes a parameter also where the last tied one before it was, and fails where
            # there was none before it: so all are excluded that follow the tied embedding.
            patterns = [r".*decoder", r".*norm"]
            parts["optimizer"]["weight_decay_exclude_named_params"] = patterns
        parts["parallelism"]["recompute_layer"] = grid.recomputes
    else:
        parts["optimizer"] |= adam
        parts["data"] = data
    return parts


def rows(step: int, grid: Grid) -> Tensor:
    """This data-parallel rank's tokens of a step: (rows, SEQUENCE + 1), int64."""
    generator = torch.Generator().manual_seed(step)
    num_rows = BATCH * ACCUMULATION
    shape = (grid.dp * num_rows, SEQUENCE + 1)
    dp_rank = dist.get_rank() // grid.tp % grid.dp
    return torch.randint(0, VOCABULARY, shape, generator=generator)[dp_rank * num_rows :][:num_rows]


def train_ours(config: Path, grid: Grid) -> Figures:
    """A run of ours, on all ranks. Returns the figures of its metrics.jsonl.

    Where it resumes a checkpoint, the optimizer's states are first compared with the file.
    """

    def load(folder: Path, optimizer: AdamW, mesh: Mesh) -> None:
        load_states(folder, optimizer, mesh)
        zero = grid.zero_stage
        found = optimizer_document(optimizer, lambda peak: peak, mesh, zero_stage=zero)
        place, sizes = place_of(mesh, zero_stage=zero), sizes_of(mesh, zero_stage=zero)
        check_states(found, folder / optimizer_path(place, sizes))

    read = TrainingConfig.load(config)
    batches = (rows(step, grid) for step in range(1, STEPS + 1))
    with mock.patch.object(our_trainer, "load_states", wraps=load) as loading:
        result = Trainer(read, batches=batches, device="cpu", is_quiet=True).run()
    assert loading.called is (read.checkpoints.resume_checkpoint_path is not None)
    assert result.step == STEPS
    dist.barrier()
    lines = (Path(read.checkpoints.checkpoints_path) / "metrics.jsonl").read_text().splitlines()
    said = [json.loads(line) for line in lines]
    return {each["step"]: (each["loss"], each["grad_norm"]) for each in said}


def check_states(found: Mapping[str, Any], path: Path) -> None:
    """Every moment, count of steps and master of a file is in an optimizer, bit for bit.

    Nanotron has no masters of parameters in fp32.
    """
    document = torch.load(path)
    pairs = [(by_name(document), by_name(found))]
    masters = document.get("gradient_accumulator"), found.get("gradient_accumulator")
    if None not in masters:
        pairs.append(masters)
    for stored, taken in pairs:
        assert stored.keys() == taken.keys() != set()
        for key, expected in stored.items():
            assert torch.equal(taken[key], expected), (path, key)


def by_name(states: Mapping[str, Any]) -> dict[tuple[str, str], Tensor]:
    """An optimizer's moments and counts, by parameter and kind."""
    return {
        (name, kind): tensor
        for index, name in states["names"].items()
        for kind, tensor in states["state"][index].items()
    }


def train_nanotron(config: Path, grid: Grid, resumed: Path | None = None) -> Figures:
    """A run of Nanotron's own trainer, on all ranks.

    Args:
        resumed: the checkpoint that the configuration resumes. The optimizer's states are first
            compared with the file. The learning rate is loaded once more: Nanotron by itself takes
            the first step with that of another one.
    """
    with cpu_mode():
        from nanotron.serialize.optimizer import optimizer_filename
        from nanotron.trainer import DistributedTrainer

        trainer = DistributedTrainer(str(config))
        if resumed is not None:
            path = optimizer_filename(trainer.parallel_context, is_zero=grid.zero_stage > 0)
            check_states(trainer.optimizer.state_dict(), resumed / "optimizer" / path)
            load_rate(trainer, resumed)
        figures: Figures = {}
        take_step = trainer.training_step

        def step(*args: Any, **kwargs: Any) -> Any:
            result = take_step(*args, **kwargs)
            losses = [None if result[1] is None else result[1].item()]
            # The first stages of a pipeline have none.
            dist.broadcast_object_list(losses, src=dist.get_world_size() - 1)
            assert losses[0] is not None
            figures[trainer.iteration_step] = losses[0], trainer.grad_norm_unclipped.item()
            return result

        trainer.training_step = step
        # Main's fails on the first stage of a pipeline, where there is no loss.
        trainer.train_step_logs = lambda **_: None
        first = trainer.iteration_step + 1
        batches = micro_batches(trainer, grid, first)
        trainer.train({"all": batches} if is_main() else batches)
        return figures


def load_rate(trainer: Any, saved: Path) -> None:
    """As Nanotron's load_lr_scheduler, but for what that does or leaves out after loading.

    Main takes a step of the schedule, as if the checkpoint were of one step later. The released 0.4
    leaves the optimizer at the rate of step 1.
    """
    from nanotron.serialize.optimizer import lr_scheduler_filename

    words = (trainer.parallel_context, False) if is_main() else ()
    scheduler = trainer.lr_scheduler
    scheduler.load_state_dict(torch.load(saved / "lr_scheduler" / lr_scheduler_filename(*words)))
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def micro_batches(trainer: Any, grid: Grid, first: int) -> Iterator[dict[str, Any]]:
    """What Nanotron's data loaders give to this rank, from a step on."""
    from nanotron import distributed as nanotron_dist
    from nanotron.parallel.pipeline_parallel.tensor_pointer import TensorPointer
    from nanotron.parallel.pipeline_parallel.utils import get_input_output_pp_ranks

    input_rank, output_rank = get_input_output_pp_ranks(model=trainer.model)
    stage = nanotron_dist.get_rank(trainer.parallel_context.pp_pg)
    for step in range(first, STEPS + 1):
        for tokens in rows(step, grid).split(BATCH):
            whole = torch.ones(BATCH, SEQUENCE, dtype=torch.bool)
            inputs = {"input_ids": tokens[:, :-1]}
            if grid.family in ("llama", "starcoder2"):
                inputs["input_mask"] = whole
            else:
                inputs["position_ids"] = torch.arange(SEQUENCE).repeat(BATCH, 1)
            outputs = {"label_ids": tokens[:, 1:], "label_mask": whole}
            given: dict[str, Any] = {}
            for rank, tensors in ((input_rank, inputs), (output_rank, outputs)):
                for name, tensor in tensors.items():
                    is_here = stage == rank
                    given[name] = tensor.contiguous() if is_here else TensorPointer(group_rank=rank)
            yield given


def written(path: Path, parts: Mapping[str, Any]) -> Path:
    """A configuration as a file of this rank's."""
    path = path.with_name(f"{path.name}-{os.environ['RANK']}.yaml")
    path.write_text(yaml.safe_dump(dict(parts)))
    return path


def check_same(ours: Figures, theirs: Figures, grid: Grid, what: str) -> None:
    """Losses and norms of the same steps."""
    assert ours.keys() == theirs.keys(), (what, ours, theirs)
    worst = max(
        abs(one - other) / abs(other)
        for step, pair in theirs.items()
        for one, other in zip(ours[step], pair, strict=True)
    )
    print(f"{grid}: {what}: {worst:.2g}", flush=True)
    assert worst <= grid.tolerance, f"{what}: {worst:.2g}\n{ours}\n{theirs}"
