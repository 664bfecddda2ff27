"""A training run's whole configuration: Nanotron's YAML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nanotron_fast.checkpoints.remote.urls import on_disk
from nanotron_fast.train.config import checks, served
from nanotron_fast.train.config.data import DataStage
from nanotron_fast.train.config.document import override, read_document
from nanotron_fast.train.config.lighteval import Lighteval
from nanotron_fast.train.config.model_config import complete
from nanotron_fast.train.config.older import modernise
from nanotron_fast.train.config.optimizer import AdamW, Muon, Optimizer
from nanotron_fast.train.config.place import Place
from nanotron_fast.train.config.schema import FILLED, INTERNAL, read, write, write_ours
from nanotron_fast.train.config.sections import (
    Checkpoints,
    General,
    Logging,
    MetricsLogging,
    Model,
    Parallelism,
    Profiler,
    S3Upload,
    Tokenizer,
    Tokens,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """Nanotron's sections, in its order, with every default filled in.

    Args:
        warnings: what to tell the user of the document that this was read from.
        place: of that document, for the errors of later checks.
        others: one section each.
    """

    general: General
    parallelism: Parallelism
    model: Model
    tokenizer: Tokenizer | None = None
    checkpoints: Checkpoints
    logging: Logging = field(default=Logging(), metadata=FILLED)
    metrics_logging: MetricsLogging | None = None
    tokens: Tokens
    optimizer: Optimizer
    data_stages: tuple[DataStage, ...]
    profiler: Profiler | None = None
    lighteval: Lighteval | None = None
    s3_upload: S3Upload | None = None
    warnings: tuple[str, ...] = field(default=(), compare=False, repr=False, metadata=INTERNAL)
    place: Place = field(default=Place("config"), compare=False, repr=False, metadata=INTERNAL)

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> TrainingConfig:
        """The configuration in a YAML file, changed by `--section.key=value` of the command line.

        Raises ConfigError, which names the file or the option, the key and what is wanted;
        UnsupportedModelError for a model that Nanotron's classes cannot express; OSError.
        """
        document = read_document(on_disk(path, "the configuration"))
        overridden = override(document, overrides)
        return cls._read(document, Place(str(path), overridden=overridden))

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], *, name: str = "config") -> TrainingConfig:
        """The same from the document itself, which errors call `name`. Raises ConfigError."""
        return cls._read(dict(document), Place(name))

    @classmethod
    def _read(cls, document: dict[str, Any], place: Place) -> TrainingConfig:
        modern, older = modernise(document, place.file)
        config = read(cls, modern, place)
        if config.model.model_config is not None:
            full = complete(config.model.model_config, place.at("model.model_config"))
            config = config.with_model_config(full)
        config = _with_defaults_of_others(config)
        served.check(config, place)
        # The stages are still in the document's order, by which errors number them.
        warnings = [*older, *checks.check(config, place)]
        warnings += served.without_effect(modern, place)
        stages = sorted(config.data_stages, key=lambda stage: stage.start_training_step)
        return replace(config, data_stages=tuple(stages), warnings=tuple(warnings), place=place)

    def with_model_config(self, model_config: Mapping[str, Any]) -> TrainingConfig:
        """The same with an architecture, of which every field is given."""
        return replace(self, model=replace(self.model, model_config=dict(model_config)))

    def to_dict(self) -> dict[str, Any]:
        """The document that real Nanotron reads: its sections and fields alone, in its order.

        What is ours is left out, and `ours()` returns it: the interleaved schedule is written as
        1f1b, ZeRO-3 as ZeRO-1, whose files it has, and Muon as the AdamW that it uses for what is
        no hidden matrix.
        """
        document: dict[str, Any] = write(self, with_ours=False)
        if self.parallelism.pp_engine == "interleaved":
            document["parallelism"]["pp_engine"] = "1f1b"
        if self.optimizer.zero_stage == 3:
            document["optimizer"]["zero_stage"] = 1
        factory = self.optimizer.optimizer_factory
        if isinstance(factory, Muon):
            document["optimizer"]["optimizer_factory"] = write(
                AdamW(
                    adam_eps=factory.adam_eps,
                    adam_beta1=factory.adam_beta1,
                    adam_beta2=factory.adam_beta2,
                    torch_adam_is_fused=factory.torch_adam_is_fused,
                )
            )
        return document

    def ours(self) -> dict[str, Any]:
        """What `to_dict` leaves out, nested in the same way; laid over it, it is this again."""
        extra = write_ours(self)
        if self.parallelism.pp_engine == "interleaved":
            extra.setdefault("parallelism", {})["pp_engine"] = "interleaved"
        if self.optimizer.zero_stage == 3:
            extra.setdefault("optimizer", {})["zero_stage"] = 3
        factory = self.optimizer.optimizer_factory
        if isinstance(factory, Muon):
            extra.setdefault("optimizer", {})["optimizer_factory"] = write(factory)
        return extra

    def to_yaml(self) -> str:
        """`to_dict` as Nanotron writes its config.yaml: keys sorted."""
        import yaml

        return str(yaml.safe_dump(self.to_dict(), default_flow_style=False, allow_unicode=True))

    @property
    def global_batch_size(self) -> int:
        """Samples of a step, over all ranks."""
        tokens = self.tokens
        replicas = self.parallelism.dp
        return tokens.micro_batch_size * tokens.batch_accumulation_per_replica * replicas

    def stage_at(self, step: int) -> DataStage:
        """The data stage of a step, counted from 1."""
        return [stage for stage in self.data_stages if stage.start_training_step <= step][-1]


def with_ours(document: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """A document of Nanotron's with our keys laid over it, as `ours()` gave them."""
    result = dict(document)
    for key, value in extra.items():
        below = result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping) and key != "optimizer_factory":
            result[key] = with_ours(below, value)
        else:
            result[key] = value
    return result


def _with_defaults_of_others(config: TrainingConfig) -> TrainingConfig:
    """What Nanotron fills in from other sections, in its own way."""
    rate = config.optimizer.learning_rate_scheduler
    decay_steps = rate.lr_decay_steps
    if decay_steps is None:
        decay_steps = max(config.tokens.train_steps - rate.lr_warmup_steps, 0)
    lowest = rate.learning_rate if rate.min_decay_lr is None else rate.min_decay_lr
    return replace(
        config,
        optimizer=replace(
            config.optimizer,
            learning_rate_scheduler=replace(rate, lr_decay_steps=decay_steps, min_decay_lr=lowest),
        ),
        data_stages=tuple(
            replace(stage, sequence_length=stage.sequence_length or config.tokens.sequence_length)
            for stage in config.data_stages
        ),
    )
