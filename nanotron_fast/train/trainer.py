"""A run from its configuration: what all ranks agree on, build and open before the first step."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from nanotron_fast import interruption
from nanotron_fast.checkpoints.ownership import Lock
from nanotron_fast.checkpoints.processes import Processes, TorchProcesses
from nanotron_fast.checkpoints.source import resolve
from nanotron_fast.errors import NanotronFastError
from nanotron_fast.formats.json_file import read_json_object
from nanotron_fast.formats.nanotron.checkpoint import MODEL_CONFIG
from nanotron_fast.train.architecture import ModelPlan, architecture
from nanotron_fast.train.beside import beside_of_run
from nanotron_fast.train.checkpoint import Beside
from nanotron_fast.train.claim import give_up
from nanotron_fast.train.config import CheckpointInit, TrainingConfig
from nanotron_fast.train.config.agreement import (
    check_agreement,
    check_packages,
    packages,
    what_ranks_share,
)
from nanotron_fast.train.config.checks import check_world_size
from nanotron_fast.train.contradictions import check_against_weights
from nanotron_fast.train.data import batches_of
from nanotron_fast.train.data.cache import Progress
from nanotron_fast.train.data.given import GivenBatches
from nanotron_fast.train.engine import engine_of
from nanotron_fast.train.mesh import Mesh, join, leave, num_processes
from nanotron_fast.train.optimizer_states import load_states
from nanotron_fast.train.reporting import reporting
from nanotron_fast.train.room import claim_room
from nanotron_fast.train.run import BatchSource, Run, TrainingResult
from nanotron_fast.train.saver import Saver
from nanotron_fast.train.signals import stop_request
from nanotron_fast.train.start import Start, find_start

Value = TypeVar("Value")


class Trainer:
    """Trains the model of a configuration.

    Args:
        config: read by `TrainingConfig.load`.
        batches: a user's own data in place of data_stages: an iterable with this data-parallel
            rank's part of each global batch, see `train.data.given.GivenBatches`. It begins with
            the first step; a run that is resumed passes over what it has taken.
        device: to compute on; by default the GPU of LOCAL_RANK, else the CPU.
        is_quiet: nothing is printed but errors' consequences: warnings and progress are left out.
        on_tokens: told the bytes of text that are made into tokens, done and in all.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        batches: Iterable[Any] | None = None,
        device: torch.device | str | None = None,
        is_quiet: bool = False,
        on_tokens: Progress | None = None,
    ) -> None:
        self.config = config
        self._given, self._device = batches, device
        self._is_quiet, self._on_tokens = is_quiet, on_tokens

    def run(self) -> TrainingResult:
        """Trains to the last step, or until SIGTERM or SIGUSR1 asks for a checkpoint and an end.

        Every rank calls it, and gets the same.

        Raises:
            NanotronFastError: the configuration, the data, a checkpoint or the number of ranks will
                not do; TrainingError: the loss is no number any more. PeerFailed: on another rank,
                which raises the reason. OSError: a file cannot be read or written.
        """
        is_ours = join(self._device)
        everyone = TorchProcesses() if num_processes() > 1 else Processes()
        try:
            (first, *_) = everyone.gather((packages(), what_ranks_share(self.config)))
            with everyone.step():
                check_packages(first[0])
                check_agreement(self.config, first[1])
                check_world_size(self.config, num_processes())
            with ExitStack() as stack:
                run = _prepared(self, everyone, stack)
                # Until here there is nothing that could be saved, and signals end the process.
                run.stop = stack.enter_context(stop_request())
                stack.enter_context(interruption.telling(run.remains))
                result = run.to_the_end()
            run.saver.close()
            everyone.close()
        except (NanotronFastError, OSError):
            # All ranks come here. After any other error the rest may be waiting for ever.
            if is_ours:
                leave()
            raise
        if is_ours:
            leave()
        return result


def _prepared(trainer: Trainer, everyone: Processes, stack: ExitStack) -> Run:
    """All that a run needs, ready for its first step. Raises what `Trainer.run` does."""
    config = trainer.config
    layout = config.parallelism
    mesh = Mesh.connect(
        dp=layout.dp,
        pp=layout.pp,
        tp=layout.tp,
        ep=layout.expert_parallel_size,
        device=trainer._device,
    )
    tell = _Teller(is_silent=trainer._is_quiet or mesh.rank > 0)
    with everyone.step():
        start = find_start(config)
    (first, *_) = everyone.gather(start.step)
    with everyone.step():
        start.check_is_after(first)
    weights = start.folder or _initial_weights(config, everyone)
    sourced = config if weights is None else _from_weights(config, weights)
    with everyone.step():
        model = architecture(sourced, min_rows=_stored_rows(start.folder))
        sourced = sourced.with_model_config(model.model_config)
        config = config.with_model_config(model.model_config)
        warnings_ = [*trainer.config.warnings, *model.warnings]
        if weights is not None and trainer.config.model.model_config and mesh.rank == 0:
            where = config.place.at("model.model_config")
            warnings_ += check_against_weights(model.architecture, weights, where)
        for warning in warnings_:
            tell("warning", warning)
        if start.folder is not None:
            last = config.tokens.train_steps
            tell("resuming", f"{start.folder}, after step {start.step} of {last}")
    lock: Lock | None = None
    with everyone.step():
        if mesh.rank == 0:
            lock = claim_room(config, model, start)
            if lock is not None:
                stack.callback(give_up, lock)
    with everyone.step():
        beside = Beside(exports_hf=config.checkpoints.export_hf)
        if mesh.rank == 0:
            beside = beside_of_run(config, model, weights)
    data = _data(trainer, sourced, model, mesh, start, everyone)
    for note in data.notes:
        tell("note", note)
    with everyone.step(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = engine_of(config, model.architecture, mesh, weights=weights)
        if start.folder is not None and config.checkpoints.load_optimizer:
            load_states(start.folder, engine.optimizer, mesh)
    for each in caught:
        tell("warning", str(each.message))
    with everyone.step():
        report = stack.enter_context(
            reporting(
                config,
                is_first_rank=mesh.rank == 0,
                is_quiet=trainer._is_quiet,
                done=start.step,
                warn=partial(tell, "warning"),
            )
        )
    saver = Saver(
        Path(config.checkpoints.checkpoints_path),
        mesh,
        beside=beside,
        keep_last=config.checkpoints.keep_last,
        warn=partial(tell, "warning"),
        lock=lock,
    )
    return Run(config, model, mesh, start, data, engine, saver, report)


def _stored_rows(resumed: Path | None) -> int:
    """Of the vocabulary in a checkpoint that is resumed: what pads it has been trained as well."""
    if resumed is None:
        return 0
    rows = read_json_object(resumed / MODEL_CONFIG).get("vocab_size")
    return rows if isinstance(rows, int) else 0


def _initial_weights(config: TrainingConfig, everyone: Processes) -> Path | None:
    """The folder that a new run's weights come from, fetched from the Hub where it is an id."""
    init = config.model.init_method
    if not isinstance(init, CheckpointInit):
        return None
    return _first_alone(everyone, lambda: resolve(init.path))


def _from_weights(config: TrainingConfig, weights: Path) -> TrainingConfig:
    """The configuration as if its model came from a folder: one that is resumed stands alone."""
    return replace(
        config, model=replace(config.model, init_method=CheckpointInit(path=str(weights)))
    )


def _data(
    trainer: Trainer,
    config: TrainingConfig,
    model: ModelPlan,
    mesh: Mesh,
    start: Start,
    everyone: Processes,
) -> BatchSource:
    """The batches of this rank."""
    if trainer._given is not None:
        return GivenBatches(
            trainer._given,
            rows=config.global_batch_size // mesh.dp,
            dp=mesh.dp,
            vocab_size=model.architecture.vocab_size,
            max_length=model.architecture.spec.max_positions,
            has_validation=config.tokens.val_check_interval > 0
            and config.tokens.limit_val_batches > 0,
        )
    is_first = mesh.rank == 0
    return _first_alone(
        everyone,
        lambda: batches_of(
            config,
            dp_rank=mesh.dp_rank,
            vocab_size=model.architecture.vocab_size,
            consumed=start.consumed,
            is_first_rank=is_first,
            on_progress=trainer._on_tokens if is_first else None,
        ),
    )


def _first_alone(everyone: Processes, make: Callable[[], Value]) -> Value:
    """What each rank makes, all others after the first: an error is told once, work done once."""
    for is_first in (True, False):
        with everyone.step():
            if (everyone.rank == 0) is is_first:
                made = make()
    return made


class _Teller:
    """Says each thing once, on stderr."""

    def __init__(self, *, is_silent: bool) -> None:
        self._is_silent = is_silent
        self._said: set[str] = set()

    def __call__(self, kind: str, text: str) -> None:
        if not self._is_silent and text not in self._said:
            self._said.add(text)
            print(f"{kind}: {text}", file=sys.stderr, flush=True)
