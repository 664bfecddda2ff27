"""The section `lighteval`, which is read as strictly as the others and has no effect here.

Names, order and defaults of the fields are those of nanotron/config/lighteval_config.py at
2411b022.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nanotron_fast.train.config.schema import FILLED, UNWRITTEN_NULL
from nanotron_fast.train.config.sections import Parallelism


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationLogging:
    """Where results go."""

    local_output_path: str | None = None
    push_results_to_hub: bool | None = None
    push_details_to_hub: bool | None = None
    push_results_to_tensorboard: bool | None = None
    hub_repo_results: str | None = None
    hub_repo_details: str | None = None
    hub_repo_tensorboard: str | None = None
    tensorboard_metric_prefix: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    """What is evaluated."""

    tasks: str | None = None
    custom_tasks: str | None = None
    max_samples: int | None = None
    num_fewshot_seeds: int | None = None
    dataset_loading_processes: int | None = 8
    multichoice_continuations_start_space: bool | None = None
    no_multichoice_continuations_start_space: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationWandb:
    """A tracker of its own."""

    wandb_project: str
    wandb_entity: str | None = None
    wandb_run_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slurm:
    """The job that evaluates."""

    gpus_per_node: int = 8
    partition: str = "hopper-prod"
    hf_cache: str = "~/.cache/huggingface"
    cpus_per_task: int = 88
    qos: str = "low"
    time: str = "24:00:00"
    reservation: str | None = "smollm"


_PARALLELISM = Parallelism(dp=1, pp=1, tp=1, tp_linear_async_communication=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lighteval:
    """Evaluations that Nanotron starts as Slurm jobs once a checkpoint is uploaded."""

    slurm_script_dir: str | None = "eval_results/launch-config"
    logs_path: str | None = "eval_results/logs"
    local_checkpoint_dir: str = "/scratch"
    parallelism: Parallelism = field(default=_PARALLELISM, metadata=FILLED)
    batch_size: int | None = None
    # One way to generate, or several by their names.
    generation: Mapping[str, Any] | None = None
    tasks: Tasks | None = None
    logging: EvaluationLogging | None = None
    wandb: EvaluationWandb | None = None
    slurm: Slurm = field(default=Slurm(), metadata=FILLED)
    s3_save_path: str | None = None
    upload_to_wandb: bool | None = False
    wandb_project: str | None = None
    wandb_entity: str | None = None
    output_dir: str | None = None
    nanotron_path: str | None = "./"
    eval_config_override: str | None = field(default=None, metadata=UNWRITTEN_NULL)
    eval_interval: int | None = None
    eval_interval_file: str | None = None
