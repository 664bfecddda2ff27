"""What the sections of a configuration must agree on, each refusal with its numbers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from nanotron_fast.errors import ConfigError, TopologyError
from nanotron_fast.model.spec import ModelSpec
from nanotron_fast.train.config.data import HfDataset, Nanoset, SftDataset
from nanotron_fast.train.config.model_config import spec_of
from nanotron_fast.train.config.place import Place
from nanotron_fast.train.config.sections import CheckpointInit

if TYPE_CHECKING:
    from nanotron_fast.train.config.training_config import TrainingConfig


def check(config: TrainingConfig, place: Place) -> list[str]:
    """Refuses sections that contradict each other; returns warnings. Raises ConfigError."""
    _check_stages(config, place)
    _check_datasets(config, place)
    _check_patterns(config, place)
    _check_pipeline(config, place)
    _check_experts(config, place)
    _check_scatter(config, place)
    if config.model.model_config is None and not isinstance(
        config.model.init_method, CheckpointInit
    ):
        raise place.at("model.model_config").error(
            " is missing: it may be left out where model.init_method.path names a Hugging Face "
            "folder or a checkpoint, whose architecture is then taken"
        )
    if config.model.model_config is not None:
        check_lengths(config, spec_of(config.model.model_config, place), place)
    return [
        *_unreached(config, place),
        *_about_the_rate(config, place),
        *_pointless(config, place),
        *_ours_alone(config, place),
    ]


def check_lengths(config: TrainingConfig, spec: ModelSpec, place: Place) -> None:
    """Refuses sequences that are longer than the model's positions. Raises ConfigError."""
    max_positions = spec.max_positions
    if max_positions is None:
        return
    places = [(place.at("tokens.sequence_length"), config.tokens.sequence_length)]
    for index, stage in enumerate(config.data_stages):
        where = place.at(f"data_stages.{index}.sequence_length")
        places.append((where, stage.sequence_length or config.tokens.sequence_length))
    for where, length in places:
        if length > max_positions:
            raise where.error(
                f" is {length}, and the model has {max_positions} positions "
                f"(model.model_config: {spec.keys_of_max_positions}): shorten it, or raise that, "
                "with rope_scaling where the model is to be extended"
            )


def check_world_size(config: TrainingConfig, world_size: int) -> None:
    """Refuses a number of ranks that is not dp x pp x tp. Raises TopologyError."""
    layout, wanted = config.parallelism, config.parallelism.world_size
    if wanted == world_size:
        return
    is_one = world_size == 1
    advice = f"start torchrun with {wanted} in all" if wanted > 1 else "start it without torchrun"
    share = layout.pp * layout.tp
    if world_size % share == 0:
        advice += f", or set --parallelism.dp={world_size // share}"
    elif is_one:
        sizes = {"dp": layout.dp, "pp": layout.pp, "tp": layout.tp}
        changes = [f"--parallelism.{name}=1" for name, size in sizes.items() if size > 1]
        advice += f", or set {' '.join(changes)}"
    # In Nanotron they are ranks beside all others.
    ep = layout.expert_parallel_size
    experts = f" (expert_parallel_size={ep} lies within dp)" if ep > 1 else ""
    raise TopologyError(
        f"{config.place.at('parallelism')}: dp={layout.dp} x pp={layout.pp} x tp={layout.tp}"
        f"{experts} {'is 1 rank' if wanted == 1 else f'are {wanted} ranks'}, and {world_size} "
        f"{'was' if is_one else 'were'} started (WORLD_SIZE): {advice}"
    )


def _check_stages(config: TrainingConfig, place: Place) -> None:
    here = place.at("data_stages")
    stages = config.data_stages
    starts = [stage.start_training_step for stage in stages]
    names = [stage.name for stage in stages]
    if 1 not in starts:
        raise here.error(f" begin at steps {starts}, and one must begin at 1")
    columns: tuple[tuple[str, list[Any]], ...] = (("name", names), ("start_training_step", starts))
    for what, values in columns:
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise here.error(f": two stages have the {what} {twice[0]!r}")


def _check_datasets(config: TrainingConfig, place: Place) -> None:
    for index, stage in enumerate(config.data_stages):
        here = place.at(f"data_stages.{index}.data.dataset")
        dataset = stage.data.dataset
        if isinstance(dataset, Nanoset):
            _check_nanoset(dataset, here)
        elif isinstance(dataset, HfDataset | SftDataset) and not _can_have_tokenizer(config):
            raise here.error(
                " is text, which needs a tokenizer: set tokenizer.tokenizer_name_or_path"
            )


def _check_nanoset(dataset: Nanoset, here: Place) -> None:
    count = len(dataset.dataset_folder)
    if not count:
        raise here.at("dataset_folder").error(" is empty: name the folders that hold .ds files")
    for name in ("dataset_weights", "dataset_read_path", "dataset_max_tokens"):
        values = getattr(dataset, name)
        if values is not None and len(values) != count:
            raise here.at(name).error(
                f" has {len(values)} values, and there are {count} folders in dataset_folder"
            )


def _can_have_tokenizer(config: TrainingConfig) -> bool:
    """A folder that weights come from may have a tokenizer as well."""
    has_name = config.tokenizer is not None and config.tokenizer.tokenizer_name_or_path is not None
    return has_name or isinstance(config.model.init_method, CheckpointInit)


def _check_patterns(config: TrainingConfig, place: Place) -> None:
    here = place.at("optimizer.weight_decay_exclude_named_params")
    for index, pattern in enumerate(config.optimizer.weight_decay_exclude_named_params):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"{here.at(index)} is {pattern!r}, and no regular expression: {error}"
            ) from None


def _check_pipeline(config: TrainingConfig, place: Place) -> None:
    layout, here = config.parallelism, place.at("parallelism")
    is_interleaved = layout.pp_engine == "interleaved"
    if layout.pp_chunks is not None and not is_interleaved:
        raise here.at("pp_chunks").error(
            f" is {layout.pp_chunks}, and pp_engine is {layout.pp_engine}: only pp_engine "
            "interleaved has several parts of the model on a rank"
        )
    if is_interleaved and layout.pp == 1:
        raise here.at("pp_engine").error(
            " is interleaved, and pp is 1: a single stage has nothing to interleave"
        )
    count = config.tokens.batch_accumulation_per_replica
    rounds = max(1, count // layout.pp)
    if is_interleaved and count % rounds:
        raise place.at("tokens.batch_accumulation_per_replica").error(
            f" is {count}, and pp_engine interleaved takes rounds of pp={layout.pp} micro "
            f"batches: use {count - count % layout.pp}"
        )


def _check_experts(config: TrainingConfig, place: Place) -> None:
    layout, here = config.parallelism, place.at("parallelism.expert_parallel_size")
    ep, dp = layout.expert_parallel_size, layout.dp
    if dp % ep:
        fits = max(size for size in range(1, ep) if dp % size == 0)
        raise here.error(
            f" is {ep}, and dp is {dp}: experts are split over data-parallel ranks, so it has to "
            f"divide dp, as {fits} does"
        )


def _check_scatter(config: TrainingConfig, place: Place) -> None:
    tp, samples = config.parallelism.tp, config.tokens.micro_batch_size
    if config.parallelism.tp_mode != "REDUCE_SCATTER":
        return
    for index, stage in enumerate(config.data_stages):
        length = stage.sequence_length or config.tokens.sequence_length
        if samples * length % tp:
            raise place.at(f"data_stages.{index}.sequence_length").error(
                f" is {length}, so a micro batch has {samples} x {length} tokens, which do not "
                f"scatter over tp={tp} (parallelism.tp_mode REDUCE_SCATTER)"
            )


def _unreached(config: TrainingConfig, place: Place) -> list[str]:
    """Stages that begin after the last step."""
    last = max(config.tokens.train_steps, 1)
    return [
        f"{place.at(f'data_stages.{index}')} ({stage.name}) begins at step "
        f"{stage.start_training_step}, and the last step is {last}: it is never reached"
        for index, stage in enumerate(config.data_stages)
        if stage.start_training_step > last
    ]


def _about_the_rate(config: TrainingConfig, place: Place) -> list[str]:
    """A learning rate that goes another way than its names say, as it would in Nanotron."""
    rate = config.optimizer.learning_rate_scheduler
    here = place.at("optimizer.learning_rate_scheduler")
    if config.tokens.train_steps == 0:
        return []
    warnings = []
    if rate.lr_warmup_steps >= config.tokens.train_steps:
        warnings.append(
            f"{here.at('lr_warmup_steps')} is {rate.lr_warmup_steps}, and there are "
            f"{config.tokens.train_steps} steps: the learning rate never decays"
        )
    begin = rate.lr_decay_starting_step
    if begin is not None and begin < rate.lr_warmup_steps:
        warnings.append(
            f"{here.at('lr_decay_starting_step')} is {begin}, within the warmup of "
            f"{rate.lr_warmup_steps} steps: the learning rate falls at once where that ends"
        )
    if rate.min_decay_lr is not None and rate.min_decay_lr > rate.learning_rate:
        warnings.append(
            f"{here.at('min_decay_lr')} is {rate.min_decay_lr:g}, above the learning_rate of "
            f"{rate.learning_rate:g}: it rises instead of decaying"
        )
    return warnings


def _pointless(config: TrainingConfig, place: Place) -> list[str]:
    """What is asked for in one place and made impossible in another."""
    warnings = []
    tokens, layout = config.tokens, config.parallelism
    if tokens.val_check_interval > 0 and tokens.limit_val_batches == 0:
        warnings.append(
            f"{place.at('tokens.limit_val_batches')} is 0, so there is no validation every "
            f"{tokens.val_check_interval} steps"
        )
    count = tokens.batch_accumulation_per_replica
    if layout.pp_engine == "1f1b" and count < layout.pp:
        warnings.append(
            f"{place.at('parallelism.pp_engine')} is 1f1b, and there are fewer micro batches "
            f"({count}) than stages ({layout.pp}): they run as with afab, which computes the same"
        )
    if config.model.dtype == "float32" and config.optimizer.accumulate_grad_in_fp32:
        warnings.append(
            f"{place.at('optimizer.accumulate_grad_in_fp32')} has no effect: the parameters are "
            "float32 themselves. Nanotron refuses it so"
        )
    if config.model.dtype != "float32" and not config.optimizer.accumulate_grad_in_fp32:
        warnings.append(
            f"{place.at('optimizer.accumulate_grad_in_fp32')} is false and has no effect: sums "
            "of gradients and masters of parameters are in fp32 in any case"
        )
    return warnings


def _ours_alone(config: TrainingConfig, place: Place) -> list[str]:
    """What Nanotron does not have, so that it cannot go on where such a run was saved."""
    asked = {
        "parallelism.pp_engine": (config.parallelism.pp_engine, "interleaved"),
        "optimizer.optimizer_factory.name": (config.optimizer.optimizer_factory.name, "muon"),
    }
    return [
        f"{place.at(path)} is {value}, which Nanotron does not have: it cannot resume this run's "
        "checkpoints"
        for path, (value, ours) in asked.items()
        if value == ours
    ]
