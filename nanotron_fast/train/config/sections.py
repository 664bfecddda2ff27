"""Every section of Nanotron's YAML that is small.

Names, order and defaults of the fields are those of nanotron/config/ at 2411b022; what is `ours`
Nanotron does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from nanotron_fast.train.config.data import DEFAULT_SEED
from nanotron_fast.train.config.place import Place
from nanotron_fast.train.config.schema import (
    FILLED,
    OURS,
    Amount,
    AtLeast,
    Count,
    Spelled,
    ToldApart,
)

LogLevel = Literal["debug", "info", "warning", "error", "critical", "passive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class General:
    """What the run is.

    Args:
        project: for the trackers.
        run: its name, where %date and %jobid stand for the time and Slurm's job: `names.run_name`.
        seed: of the random initialisation.
        others: no effect.
    """

    project: str
    run: str = field(default="%date_%jobid", metadata=FILLED)
    seed: int = field(default=DEFAULT_SEED, metadata=FILLED)
    step: int | None = None
    consumed_train_samples: int | None = None
    benchmark_csv_path: str | None = None
    ignore_sanity_checks: bool = True


def _engine(text: str) -> str:
    """`gpipe` is how torch calls Nanotron's `afab`."""
    return {"gpipe": "afab"}.get(text.lower(), text.lower())


Engine = Annotated[Literal["afab", "1f1b", "interleaved"], Spelled(_engine)]
TpMode = Annotated[Literal["ALL_REDUCE", "REDUCE_SCATTER"], Spelled(str.upper)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelism:
    """How many ranks there are, and how they share the work.

    Args:
        dp, pp, tp: data-parallel replicas, pipeline stages, tensor-parallel shards.
        pp_engine: the schedule of the pipeline; interleaved is ours.
        tp_mode: whether activations between the blocks are whole or shared out among tp ranks.
        tp_linear_async_communication: no effect; communication runs beside the work in any case.
        recompute_layer: run a decoder layer again in backward instead of keeping its activations.
        tp_recompute_allgather: in REDUCE_SCATTER mode gather inputs again in backward.
        expert_parallel_size: ranks that the experts of each layer are split over. They are
            data-parallel ranks, so it divides dp; in Nanotron they are ranks beside all others.
        context_parallel_size: 1.
        pp_chunks: ours; parts of the model on each rank with pp_engine interleaved (default 2).
    """

    dp: Count
    pp: Count
    tp: Count
    pp_engine: Annotated[Literal["afab", "1f1b", "interleaved"], Spelled(_engine)] = field(
        default="afab", metadata=FILLED
    )
    tp_mode: Annotated[Literal["ALL_REDUCE", "REDUCE_SCATTER"], Spelled(str.upper)] = field(
        default="ALL_REDUCE", metadata=FILLED
    )
    tp_linear_async_communication: bool = field(default=False, metadata=FILLED)
    recompute_layer: bool = False
    tp_recompute_allgather: bool = True
    expert_parallel_size: Count = 1
    context_parallel_size: Count = 1
    pp_chunks: Annotated[int, AtLeast(2)] | None = field(default=None, metadata=OURS)

    @property
    def world_size(self) -> int:
        """Ranks of a run."""
        return self.dp * self.pp * self.tp

    @property
    def chunks(self) -> int:
        """Parts of the model that a rank holds."""
        return (self.pp_chunks or 2) if self.pp_engine == "interleaved" else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomInit:
    """Normal values; those of output projections are smaller, by scaling_method."""

    std: Annotated[float, AtLeast(0)]
    scaling_method: Annotated[
        Literal["NONE", "NUM_LAYERS", "LAYER_INDEX", "MODEL_SCALE"], Spelled(str.upper)
    ] = "NUM_LAYERS"


@dataclass(frozen=True, slots=True, kw_only=True)
class MupInit:
    """Spectral muP: initialisation, and a learning rate of its own for each linear layer."""

    use_mup: Literal[True]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInit:
    """The weights of a Hugging Face folder or of a Nanotron checkpoint, at any topology."""

    path: str


def _init_kind(document: Mapping[str, Any], place: Place) -> type:
    kinds: dict[str, type] = {"path": CheckpointInit, "use_mup": MupInit, "std": RandomInit}
    for key, kind in kinds.items():
        if key in document:
            return kind
    raise place.error(
        " should have path (a checkpoint), std (random weights) or use_mup: true (random, by "
        "spectral muP)"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The architecture, and where the weights come from.

    Args:
        model_config: one of Nanotron's model classes, every field filled in; None to take the
            architecture from `init_method.path`.
        init_method: where the weights come from.
        dtype: of the parameters, by torch's name.
        make_vocab_size_divisible_by: the vocabulary is padded to a multiple of this times tp.
        ddp_bucket_cap_mb: no effect; gradients are not summed by DistributedDataParallel.
    """

    model_config: Mapping[str, Any] | None = None
    init_method: Annotated[CheckpointInit | MupInit | RandomInit, ToldApart(_init_kind)]
    dtype: str = field(default="bfloat16", metadata=FILLED)
    make_vocab_size_divisible_by: Count = 1
    ddp_bucket_cap_mb: Count = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """Which tokenizer reads text; tokenizer_max_length has no effect."""

    tokenizer_name_or_path: str | None = None
    tokenizer_revision: str | None = None
    tokenizer_max_length: Count | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """Where checkpoints are written, when, and what to resume.

    Args:
        checkpoints_path: the folder of a run: a folder for each step, metrics.jsonl, latest.txt.
        checkpoint_interval: steps between two.
        save_initial_state: also before the first step.
        save_final_state: also after the last step.
        resume_checkpoint_path: a checkpoint, or a folder with latest.txt.
        load_lr_scheduler: the learning rate goes on from there.
        load_optimizer: the optimizer's states and the fp32 masters are read too.
        checkpoints_path_is_shared_file_system: no effect.
        keep_last: ours; how many checkpoints to keep, None for all.
        export_hf: ours; write a Hugging Face folder `hf/` into each.
    """

    checkpoints_path: str
    checkpoint_interval: Count
    save_initial_state: bool = field(default=False, metadata=FILLED)
    save_final_state: bool = field(default=True, metadata=FILLED)
    resume_checkpoint_path: str | None = None
    load_lr_scheduler: bool = field(default=True, metadata=FILLED)
    load_optimizer: bool = field(default=True, metadata=FILLED)
    checkpoints_path_is_shared_file_system: bool = field(default=False, metadata=FILLED)
    keep_last: Count | None = field(default=None, metadata=OURS)
    export_hf: bool = field(default=False, metadata=OURS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Logging:
    """What is printed.

    Args:
        log_level: of the first rank.
        log_level_replica: of the others.
        iteration_step_info_interval: steps between two lines.
    """

    log_level: LogLevel = field(default="info", metadata=FILLED)
    log_level_replica: LogLevel = field(default="info", metadata=FILLED)
    iteration_step_info_interval: Count = field(default=1, metadata=FILLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsLogging:
    """Nanotron's norms of each layer, which have no effect here."""

    log_level: Literal[0, 1] = 0
    log_detail_interval: Count = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """How much is trained on.

    Args:
        sequence_length: tokens of a sample.
        train_steps: the last step; with 0 the weights are saved as they begin.
        micro_batch_size: samples of one pass through the model.
        batch_accumulation_per_replica: such passes of each data-parallel replica in a step.
        val_check_interval: steps between two validations; -1 for none.
        limit_val_batches: micro batches of each data-parallel replica in a validation.
        limit_test_batches: no effect.
    """

    sequence_length: Count
    train_steps: Amount
    micro_batch_size: Count
    batch_accumulation_per_replica: Count
    val_check_interval: Annotated[int, AtLeast(-1)] = field(default=-1, metadata=FILLED)
    limit_val_batches: Annotated[int, AtLeast(0)] = field(default=0, metadata=FILLED)
    limit_test_batches: Annotated[int, AtLeast(0)] = field(default=0, metadata=FILLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiler:
    """torch's profiler in Nanotron, which has no effect here."""

    profiler_export_path: str | None
    wait: int = 1
    warmup: int = 1
    active: int = 1
    repeat: int = 1
    skip_first: int = 3
    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = True
    export_chrome_trace: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Upload:
    """Nanotron's uploads, which have no effect here."""

    upload_s3_path: str
    remove_after_upload: bool
    s5cmd_numworkers: int | None
    s5cmd_concurrency: int | None
    s5cmd_path: str | None
