"""What a run comes to, for `nanotron-fast train --dry-run`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanotron_fast.cli import reporting
from nanotron_fast.errors import ConfigError
from nanotron_fast.train.advice import advice
from nanotron_fast.train.architecture import ModelPlan, architecture
from nanotron_fast.train.config import TrainingConfig
from nanotron_fast.train.estimate import Estimate, estimate
from nanotron_fast.train.sources import missing
from nanotron_fast.units import parse_size, size
from nanotron_fast.words import meant


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a configuration comes to.

    Args:
        advice: what to change where a rank has too little memory; else empty.
        memory_bytes: of a rank, as the user gave it.
    """

    config: TrainingConfig
    model: ModelPlan
    estimate: Estimate
    advice: tuple[str, ...] = ()
    memory_bytes: int | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Of the configuration, of the model's source, and of data that are not here."""
        return (*self.config.warnings, *self.model.warnings, *missing(self.config))

    def to_json(self) -> dict[str, Any]:
        """The estimate, and with a memory to fit in, whether it does and what to change."""
        document = self.estimate.to_json()
        if self.memory_bytes is not None:
            document |= {"fits": not self.advice, "advice": list(self.advice)}
        return document

    def lines(self) -> Iterator[str]:
        """The same for people."""
        layout, found = self.config.parallelism, self.estimate
        model = self.model.architecture
        tied = ", tied" if model.spec.tie_word_embeddings else ""
        yield f"{self.config.place}"
        yield f"  family      {model.family.name} ({model.model_class})"
        yield f"  parameters  {found.parameters:,} in {self.config.model.dtype}{tied}"
        engine = f", {layout.pp_engine}" if layout.pp > 1 else ""
        mode = f", {layout.tp_mode}" if layout.tp > 1 else ""
        experts = layout.expert_parallel_size
        ep = f" ep={experts}" if experts > 1 else ""
        yield (
            f"  ranks       {layout.world_size}: dp={layout.dp} pp={layout.pp} tp={layout.tp}{ep}"
            f"{engine}{mode}"
        )
        others = self.model.stages().others
        on_ranks = {block: stage % layout.pp for block, stage in others.items()}
        for line in reporting.stage_lines(found.layer_stages, on_ranks, layout.pp):
            yield f"              {line}"
        yield (
            f"  step        {found.tokens_per_step:,} tokens in {self.config.global_batch_size:,} "
            f"samples, {found.flops_per_step:.3g} FLOPs"
        )
        yield f"  training    {self.config.tokens.train_steps:,} steps"
        where = f" of stage {found.fullest_stage}, which needs most" if layout.pp > 1 else ""
        yield f"  memory      {size(found.memory.total)} for a rank{where}"
        for name, num_bytes in asdict(found.memory).items():
            yield f"              {name:<11} {size(num_bytes):>10}"
        if self.memory_bytes is not None and not self.advice:
            yield f"  it fits into {size(self.memory_bytes)}"
        for line in self.advice:
            yield f"  {line}"


def overrides_of(arguments: Sequence[str], options: Collection[str] = ()) -> list[str]:
    """What the command line has beside the known options: `--section.key=value` alone.

    Raises ConfigError, which says which of the options may have been meant.
    """
    for each in arguments:
        path, has_value, _ = each.partition("=")
        if not path.startswith("--"):
            raise ConfigError(f"{each}: one configuration is read, and options begin with --")
        if "." not in path:
            likely = meant(path, options) or "; keys are set by --section.key=VALUE"
            raise ConfigError(f"{path}: train has no such option{likely}")
        if not has_value:
            raise ConfigError(f"{each}: write {each}=VALUE")
    return list(arguments)


def dry_run(
    config: str | Path, overrides: Iterable[str] = (), *, memory: str | None = None
) -> DryRun:
    """What a configuration comes to, without a GPU and without reading weights.

    Args:
        config: the YAML file.
        overrides: `--section.key=value`.
        memory: of a rank, such as "80GB".

    Raises what TrainingConfig.load and architecture raise, and ConfigError for a memory that is no
    size.
    """
    memory_bytes = None if memory is None else parse_size(memory, "--memory")
    read = TrainingConfig.load(config, overrides)
    model = architecture(read)
    changes = () if memory_bytes is None else tuple(advice(read, model, memory_bytes))
    return DryRun(read, model, estimate(read, model), changes, memory_bytes)
