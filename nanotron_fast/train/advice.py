"""What to change in a configuration whose ranks would need more memory than there is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nanotron_fast.errors import TopologyError, UnsupportedModelError
from nanotron_fast.train.architecture import ModelPlan
from nanotron_fast.train.config import TrainingConfig
from nanotron_fast.train.estimate import estimate
from nanotron_fast.units import size


@dataclass(frozen=True, slots=True)
class _Change:
    """The options that say it, and the configuration with it."""

    options: Mapping[str, object]
    config: TrainingConfig

    def __str__(self) -> str:
        words = " ".join(f"--{path}={value}" for path, value in self.options.items())
        ranks = self.config.parallelism.world_size
        return f"{words} ({ranks} rank{'' if ranks == 1 else 's'})"


def advice(config: TrainingConfig, model: ModelPlan, memory_bytes: int) -> list[str]:
    """Lines that say what to change so that a rank needs at most so many bytes.

    Each change is tried on the estimate, those first that need no more ranks: one by one, and where
    none is enough, one after the other. Empty where the configuration fits as it is.
    """
    needed = estimate(config, model).memory.total
    if needed <= memory_bytes:
        return []
    lines = [
        f"a rank needs {size(needed)} and has {size(memory_bytes)}, which is "
        f"{size(needed - memory_bytes)} too little"
    ]
    for change in _changes(config):
        total = _total(change, model)
        if total is not None and total <= memory_bytes:
            lines.append(f"{change}: {size(total)}, which fits")
    return lines if len(lines) > 1 else [*lines, _together(config, model, needed, memory_bytes)]


def _together(config: TrainingConfig, model: ModelPlan, needed: int, memory_bytes: int) -> str:
    """The changes that are enough one after the other, each of which helps; or that none are."""
    options: dict[str, object] = {}
    while needed > memory_bytes:
        for change in _changes(config):
            total = _total(change, model)
            if total is not None and total < needed:
                needed, config = total, change.config
                options |= change.options
                break
        else:
            break
    together = _Change(options, config)
    if needed <= memory_bytes:
        return f"together, {together}: {size(needed)}, which fits"
    if not options:
        return "nothing that could be changed makes it less: use a smaller model"
    return f"even {together} leave {size(needed)}: use a smaller model or shorter sequences"


def _changes(config: TrainingConfig) -> Iterator[_Change]:
    """Single changes that may need less, those first that cost least time and no more ranks."""
    layout, tokens = config.parallelism, config.tokens
    if config.optimizer.zero_stage == 0 and layout.dp > 1:
        yield _with_zero(config, 1)
    if layout.tp > 1 and layout.tp_mode == "ALL_REDUCE":
        yield _with_layout(config, tp_mode="REDUCE_SCATTER")
    if layout.pp > 1 and layout.pp_engine == "afab":
        yield _with_layout(config, pp_engine="1f1b")
    if tokens.micro_batch_size > 1:
        # The largest divisor, so that the global batch stays.
        sizes = range(1, tokens.micro_batch_size)
        fewer = max(each for each in sizes if tokens.micro_batch_size % each == 0)
        more = tokens.batch_accumulation_per_replica * (tokens.micro_batch_size // fewer)
        changed = {"micro_batch_size": fewer, "batch_accumulation_per_replica": more}
        yield _Change(
            {f"tokens.{name}": value for name, value in changed.items()},
            replace(
                config,
                tokens=replace(tokens, micro_batch_size=fewer, batch_accumulation_per_replica=more),
            ),
        )
    if not layout.recompute_layer:
        yield _with_layout(config, recompute_layer=True)
    if layout.dp % (2 * layout.expert_parallel_size) == 0:
        yield _with_layout(config, expert_parallel_size=2 * layout.expert_parallel_size)
    if config.optimizer.zero_stage < 3 and layout.dp > 1:
        yield _with_zero(config, 3)
    yield _with_layout(config, tp=2 * layout.tp)
    yield _with_layout(config, pp=2 * layout.pp)


def _with_zero(config: TrainingConfig, stage: int) -> _Change:
    changed = replace(config.optimizer, zero_stage=stage)
    return _Change({"optimizer.zero_stage": stage}, replace(config, optimizer=changed))


def _with_layout(config: TrainingConfig, **changes: Any) -> _Change:
    options = {
        f"parallelism.{name}": str(value).lower() if isinstance(value, bool) else value
        for name, value in changes.items()
    }
    return _Change(options, replace(config, parallelism=replace(config.parallelism, **changes)))


def _total(change: _Change, model: ModelPlan) -> int | None:
    """What a rank needs; None where the model does not spread over so many."""
    try:
        return estimate(change.config, model.spread(change.config)).memory.total
    except (TopologyError, UnsupportedModelError):
        return None
