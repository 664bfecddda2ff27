"""What of Nanotron's schema is refused, and what is read and has no effect, each with its reason.

A new field of the schema belongs into one of these tables unless the training uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanotron_fast.errors import ConfigError
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.train.config.place import Place, shown
from nanotron_fast.train.config.sections import CheckpointInit, RandomInit

if TYPE_CHECKING:
    from nanotron_fast.train.config.training_config import TrainingConfig

DTYPES = ("bfloat16", "float32")
# As other options spell them, which Nanotron does not.
_SHORT = {each.short_name: each.torch_name for each in Dtype if each.torch_name in DTYPES}
ZERO_STAGES = (0, 1, 3)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something that cannot be served.

    Args:
        path: dotted, of the field.
        value: of it, to show; None where there is nothing to refuse.
        reason: why, and what to do instead.
    """

    path: str
    value: Callable[[TrainingConfig], object | None]
    reason: str


def _over_one(size: int) -> int | None:
    return size if size > 1 else None


def _scaling(config: TrainingConfig) -> object | None:
    init = config.model.init_method
    if not isinstance(init, RandomInit):
        return None
    return _outside(init.scaling_method, ("NONE", "NUM_LAYERS"))


def _s3(path: str | None) -> str | None:
    return path if path is not None and "://" in path else None


def _init_s3(config: TrainingConfig) -> object | None:
    init = config.model.init_method
    return _s3(init.path) if isinstance(init, CheckpointInit) else None


def _outside(value: object, allowed: tuple[object, ...]) -> object | None:
    return None if value in allowed else value


_LOCAL = "checkpoints are read from and written to folders; mount it, or copy them afterwards"
REFUSALS = (
    Refusal(
        "parallelism.context_parallel_size",
        lambda config: _over_one(config.parallelism.context_parallel_size),
        "attention over a sequence that is split among ranks is not implemented. Use tp with "
        "tp_mode REDUCE_SCATTER, or recompute_layer, for long sequences",
    ),
    Refusal(
        "optimizer.zero_stage",
        lambda config: _outside(config.optimizer.zero_stage, ZERO_STAGES),
        "there is 0 (every rank keeps all states of the optimizer), 1 (they are shared out among "
        "dp ranks) and 3 (weights and gradients as well)",
    ),
    Refusal(
        "model.dtype",
        lambda config: _outside(config.model.dtype, DTYPES),
        f"parameters are {' or '.join(DTYPES)}: in other types they overflow, or no kernel takes "
        "them",
    ),
    Refusal(
        "model.init_method.scaling_method",
        _scaling,
        "Nanotron has no formula for it either; there are NUM_LAYERS and NONE",
    ),
    Refusal("checkpoints.checkpoints_path", lambda c: _s3(c.checkpoints.checkpoints_path), _LOCAL),
    Refusal(
        "checkpoints.resume_checkpoint_path",
        lambda c: _s3(c.checkpoints.resume_checkpoint_path),
        _LOCAL,
    ),
    Refusal("model.init_method.path", _init_s3, _LOCAL),
)


@dataclass(frozen=True, slots=True)
class Idle:
    """A field that has no effect.

    Args:
        path: dotted; * stands for every element of a list.
        reason: why nothing is lost, or what is.
        asks_for_nothing: values at which there is nothing to tell.
    """

    path: str
    reason: str
    asks_for_nothing: tuple[object, ...] = ()


IDLE = (
    Idle("general.step", "a run goes on at the step of the checkpoint that it resumes"),
    Idle(
        "general.consumed_train_samples",
        "a run goes on at the step of the checkpoint that it resumes",
    ),
    Idle("general.benchmark_csv_path", "the figures of every step are in metrics.jsonl"),
    Idle("general.ignore_sanity_checks", "Nanotron's sanity checks are not run", (True,)),
    Idle(
        "parallelism.tp_linear_async_communication",
        "communication runs beside the products wherever that pays",
        (False,),
    ),
    Idle(
        "parallelism.tp_recompute_allgather",
        "with REDUCE_SCATTER inputs are always gathered again in backward, which takes less memory",
        (True,),
    ),
    Idle(
        "logging.log_level", "warnings and figures are always printed, by the first rank", ("info",)
    ),
    Idle("logging.log_level_replica", "the first rank alone prints", ("info",)),
    Idle("model.ddp_bucket_cap_mb", "gradients are not summed by DistributedDataParallel", (25,)),
    Idle("tokenizer.tokenizer_max_length", "samples have the length of the stage"),
    Idle(
        "checkpoints.checkpoints_path_is_shared_file_system",
        "every rank writes into checkpoints_path, so all nodes must see it",
        (True,),
    ),
    Idle("tokens.limit_test_batches", "there is no test after the training", (0,)),
    Idle("optimizer.optimizer_factory.torch_adam_is_fused", "the step is always fused", (True,)),
    Idle("data_stages.*.data.num_loading_workers", "batches are made ready by a thread", (0, 1)),
    Idle(
        "data_stages.*.data.dataset.skip_in_stream",
        "samples are read by their position",
        (False,),
    ),
    Idle(
        "data_stages.*.data.dataset.pad_samples_to_global_batch_size",
        "a dataset is read again from its start where it ends",
        (False,),
    ),
    Idle("metrics_logging", "norms of single layers are not logged"),
    Idle("profiler", "nothing is profiled"),
    Idle("lighteval", "checkpoints are not evaluated"),
    Idle("s3_upload", "checkpoints stay in checkpoints_path, and nothing is uploaded or removed"),
)


def check(config: TrainingConfig, place: Place) -> None:
    """Refuses what cannot be served. Raises ConfigError."""
    meant = _SHORT.get(config.model.dtype.lower())
    if meant is not None:
        where = place.at("model.dtype")
        raise where.error(f" is {shown(config.model.dtype)}: did you mean {meant}?")
    for each in REFUSALS:
        value = each.value(config)
        if value is not None:
            where = place.at(each.path)
            raise ConfigError(f"{where} is {shown(value)}, which cannot be served: {each.reason}")


def without_effect(document: Mapping[str, Any], place: Place) -> list[str]:
    """One warning for each field of a document that asks for something and has no effect."""
    warnings = []
    for each in IDLE:
        found = [
            (path, value)
            for path, value in _values(document, each.path.split("."), "")
            if value is not None and not _is_one_of(value, each.asks_for_nothing)
        ]
        if found:
            path, _ = found[0]
            warnings.append(f"{place.at(path)} has no effect: {each.reason}")
    return warnings


def _is_one_of(value: object, others: tuple[object, ...]) -> bool:
    """As YAML has them: true is not 1."""
    return any(type(value) is type(other) and value == other for other in others)


def _values(holder: object, keys: list[str], path: str) -> Iterator[tuple[str, object]]:
    """Every value at a path in which * stands for every index, with its own path."""
    if not keys:
        yield path.removeprefix("."), holder
    elif keys[0] == "*" and isinstance(holder, list):
        for index, item in enumerate(holder):
            yield from _values(item, keys[1:], f"{path}.{index}")
    elif isinstance(holder, Mapping) and keys[0] in holder:
        yield from _values(holder[keys[0]], keys[1:], f"{path}.{keys[0]}")
