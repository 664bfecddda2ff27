"""A rank of Nanotron's own trainer on the CPU.

`python -m tests.nanotron.trainer_ranks FOLDER PORT FAMILY key=value...` trains for two steps over
all ranks and saves a checkpoint in FOLDER/2. Keys are the fields of Run.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from nanotron_fast.patch.cpu import cpu_mode
from nanotron_fast.patch.importing import import_nanotron
from nanotron_fast.patch.nanotron.registry import disable, enable
from tests.nanotron.training import BATCH, SEQUENCE, SIZES, join_environment
from tests.parallel.ranks import run_cases


@dataclass
class Run:
    """What differs between runs. `ops` of the drop-in, with pluses between; empty: it is off.

    `resume` is the checkpoint to go on from, for two steps more.
    """

    ops: str = ""
    resume: str = ""
    dp: int = 1
    pp: int = 1
    zero_stage: int = 0
    grad_fp32: bool = True

    @classmethod
    def from_words(cls, words: list[str]) -> Run:
        given = dict(word.split("=") for word in words)
        words = {name: given.pop(name, "") for name in ("ops", "resume")}
        return cls(**words, **{name: int(value) for name, value in given.items()})


def configuration(folder: str, family: str, size: int, is_main: bool, run: Run) -> dict[str, Any]:
    """What a user would write into a file. Main and the released 0.4 differ in three places."""
    adam = {"adam_eps": 1e-8, "adam_beta1": 0.9, "adam_beta2": 0.95, "torch_adam_is_fused": True}
    data = {"dataset": None, "num_loading_workers": 0, "seed": 42}
    return {
        "general": {"project": "tests", "run": "cpu", "seed": 42, "ignore_sanity_checks": False},
        "checkpoints": {
            "checkpoint_interval": 2,
            "checkpoints_path": folder,
            "checkpoints_path_is_shared_file_system": True,
            "resume_checkpoint_path": run.resume or None,
            "save_initial_state": False,
        },
        "parallelism": {
            "dp": run.dp,
            "pp": run.pp,
            "tp": size // run.dp // run.pp,
            "pp_engine": "1f1b",
            "tp_mode": "REDUCE_SCATTER",
            # The released 0.4 gets its gradients wrong with it.
            "tp_linear_async_communication": is_main,
            "expert_parallel_size": 1,
        },
        "model": {
            "dtype": "bfloat16",
            "init_method": {"std": 0.025},
            "model_config": {**SIZES, f"is_{family}_config": True, "tie_word_embeddings": True},
        },
        "tokenizer": {"tokenizer_name_or_path": None},
        "optimizer": {
            "zero_stage": run.zero_stage,
            "weight_decay": 0.01,
            "clip_grad": 1.0,
            "accumulate_grad_in_fp32": bool(run.grad_fp32),
            "learning_rate_scheduler": {
                "learning_rate": 1e-3,
                "lr_warmup_steps": 1,
                "lr_warmup_style": "linear",
                "lr_decay_style": "cosine",
                "min_decay_lr": 1e-5,
            },
            **({"optimizer_factory": {**adam, "name": "adamW"}} if is_main else adam),
        },
        "logging": {"log_level": "info", "log_level_replica": "info"},
        "tokens": {
            "sequence_length": SEQUENCE,
            "train_steps": 4 if run.resume else 2,
            "micro_batch_size": BATCH,
            "batch_accumulation_per_replica": 2,
        },
        **(
            {"data_stages": [{"name": "all", "start_training_step": 1, "data": data}]}
            if is_main
            else {"data": data}
        ),
    }


def train(folder: str, port: str, family: str, *words: str) -> None:
    join_environment(int(port))
    size, rank = int(os.environ["WORLD_SIZE"]), os.environ["RANK"]
    run = Run.from_words([*words])
    import_nanotron()
    if run.ops:
        enable("all" if run.ops == "all" else run.ops.split("+"))
    from nanotron.parallel.pipeline_parallel.utils import get_input_output_pp_ranks
    from nanotron.trainer import DistributedTrainer

    is_main = importlib.util.find_spec("nanotron.data") is not None
    if is_main:
        from nanotron.data.dataloader import dummy_infinite_data_generator
    else:
        from nanotron.dataloader import dummy_infinite_data_generator
    path = Path(f"{folder}-{rank}.yaml")
    path.write_text(yaml.safe_dump(configuration(folder, family, size, is_main, run)))
    trainer = DistributedTrainer(str(path))
    first, last = get_input_output_pp_ranks(model=trainer.model)
    context = trainer.parallel_context
    options = {"micro_batch_size": BATCH, "sequence_length": SEQUENCE, "seed": 3}
    if is_main:
        options |= {"use_position_ids": family == "qwen2", "cp_pg": context.cp_pg}
    batches = dummy_infinite_data_generator(
        **options,
        input_pp_rank=first,
        output_pp_rank=last,
        vocab_size=SIZES["vocab_size"],
        parallel_context=context,
    )()
    trainer.train({"all": batches} if is_main else batches)
    optimizer = trainer.optimizer.get_base_optimizer()
    is_ours = run.ops == "all" or "adamw" in run.ops.split("+")
    assert type(optimizer).__name__ == ("FusedAdamW" if is_ours else "AdamW")
    disable()
    assert type(optimizer) is torch.optim.AdamW
    trainer.optimizer.step()  # the scheduler has wrapped the step of the class that it was


if __name__ == "__main__":
    with cpu_mode():
        run_cases([("trainer", partial(train, *sys.argv[1:]))])
