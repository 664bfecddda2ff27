"""The steps of a run, one after another: batch, step, validation, report, checkpoint.

Every rank does the same in the same order. What can go wrong on one of them (a file, a batch, a
signal) is told to all before they take the next step together, so that none waits for one that has
left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nanotron_fast.checkpoints.processes import PeerFailed
from nanotron_fast.errors import NanotronFastError, TrainingError
from nanotron_fast.train.architecture import ModelPlan
from nanotron_fast.train.checkpoint import metadata_document, snapshot
from nanotron_fast.train.config import TrainingConfig
from nanotron_fast.train.data import MicroBatch
from nanotron_fast.train.data.prefetch import ahead
from nanotron_fast.train.devices import peak_flops
from nanotron_fast.train.engine import Engine
from nanotron_fast.train.estimate import flops_of_sequence
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.metrics import StepMetrics
from nanotron_fast.train.optimizer import Rate
from nanotron_fast.train.reporting import Report, peak_memory_bytes
from nanotron_fast.train.saver import Saver
from nanotron_fast.train.schedule import learning_rate
from nanotron_fast.train.signals import StopRequest
from nanotron_fast.train.start import Start
from nanotron_fast.train.step import StepResult
from nanotron_fast.train.zero import resolve_group

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What the ranks say after a step: one has failed, one was asked to stop; the most memory."""

    is_failed: bool
    is_stopped: bool
    memory: int

    @property
    def ends(self) -> bool:
        return self.is_failed or self.is_stopped


class BatchSource(Protocol):
    """What is asked of the data. `notes` are sentences about it that a user may want to know."""

    @property
    def notes(self) -> Sequence[str]: ...

    def batch(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step, counted from 1. Raises DataError, OSError."""

    def validation(self, step: int) -> list[MicroBatch]:
        """Those of a validation after a step; empty where there is none."""

    def consumed(self, step: int) -> Sequence[dict[str, Any]]:
        """What each data stage that was begun has given once a step is done.

        As `checkpoint.metadata_document` takes them, the one in use last.
        """

    def tokens(self, step: int) -> int:
        """Tokens of all ranks that are taken once a step is done."""


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a run came to.

    Args:
        step: the last one that was taken.
        loss: of it; None where the run took none.
        validation_loss: of the last validation; None where there was none.
        checkpoint: the last that is whole; None where none was written.
        stopped_by: the signal that ended the run before its last step, else None.
    """

    step: int
    loss: float | None
    validation_loss: float | None
    checkpoint: Path | None
    stopped_by: str | None

    def to_json(self) -> dict[str, Any]:
        """The contract of `train --json`."""
        return {
            "step": self.step,
            "loss": self.loss,
            "validation_loss": self.validation_loss,
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "stopped_by": self.stopped_by,
        }


@dataclass(slots=True)
class Run:
    """A rank of a run that is ready to begin.

    Args:
        config: with the model's own fields.
        start: after which step it begins.
        data: of this data-parallel rank.
        report: called with the figures of each step.
        stop: what signals ask for.
        taken: the last step that was.
    """

    config: TrainingConfig
    model: ModelPlan
    mesh: Mesh
    start: Start
    data: BatchSource
    engine: Engine
    saver: Saver
    report: Report
    stop: StopRequest = field(default_factory=StopRequest)
    taken: int = field(init=False, default=0)

    def to_the_end(self) -> TrainingResult:
        """Takes the steps. Raises what `Trainer.run` does."""
        step, last = self.start.step, self.config.tokens.train_steps
        self.taken = step
        section = self.config.checkpoints
        metrics: StepMetrics | None = None
        validation_loss: float | None = None
        failure: BaseException | None
        unreported: BaseException | None = None
        if section.save_initial_state and self.start.folder is None:
            self._save(step)
        with closing(ahead(self._batch, range(step + 1, last + 1))) as batches:
            batch, failure, waited = _next(batches)
            verdict = self._verdict(failure)
            while batch is not None and not verdict.ends:
                step += 1
                begun = time.perf_counter()
                result = self._step(step, batch)
                loss, norm = result.loss.item(), result.grad_norm.item()
                self.taken = step
                seconds = waited + time.perf_counter() - begun
                batch, failure, waited = _next(batches)
                held_out, no_validation = _tried(partial(self._held_out, step))
                failure = unreported or failure or no_validation or self.saver.error
                verdict = self._verdict(failure)
                metrics = self._metrics(step, loss, norm, seconds, verdict.memory)
                if held_out and not verdict.is_failed:
                    validation_loss = self._validation_loss(held_out)
                    metrics = replace(metrics, validation_loss=validation_loss)
                _, unreported = _tried(partial(self.report, metrics))
                self._check(metrics)
                if step % section.checkpoint_interval == 0 and not verdict.is_failed:
                    self._save(step)
        if verdict.is_failed:
            self._leave(step, failure)
        is_cut = verdict.is_stopped and step < last
        is_new = metrics is not None or self.start.folder is None
        if is_new and (is_cut or section.save_final_state):
            self._save(step)
        unsaved = self.saver.finished()
        self._agree(unreported or unsaved)
        return TrainingResult(
            step,
            None if metrics is None else metrics.loss,
            validation_loss,
            self.saver.last or self.start.folder,
            self.stop.name if is_cut else None,
        )

    def remains(self) -> str:
        """What there is of the run where a signal ends it at once."""
        return f"after step {self.taken} of {self.config.tokens.train_steps}; {self._kept()}"

    def _kept(self) -> str:
        kept = self.saver.last or self.start.folder
        root = self.config.checkpoints.checkpoints_path
        return f"{kept} is the last checkpoint" if kept else f"{root} has no checkpoint yet"

    def _batch(self, step: int) -> dict[str, Tensor]:
        return self._joined(self.data.batch(step))

    def _joined(self, micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
        """The rows of all micro-batches, in memory from which a GPU can take them."""
        tensors = {
            "input_ids": torch.cat([each.input_ids for each in micro_batches]),
            "labels": torch.cat([each.labels for each in micro_batches]),
        }
        positions = [each.position_ids for each in micro_batches if each.position_ids is not None]
        if self.mesh.device.type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        if positions:  # of which documents are counted on the CPU
            tensors["position_ids"] = torch.cat(positions)
        return tensors

    def _moved(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the device, but for the positions: documents are counted on the CPU."""
        device = self.mesh.device
        return {
            name: tensor if name == "position_ids" else tensor.to(device, non_blocking=True)
            for name, tensor in tensors.items()
        }

    def _rate(self, step: int) -> Rate:
        """The learning rate of a step, from a parameter's highest one."""
        schedule = self.config.optimizer.learning_rate_scheduler
        if not self.config.checkpoints.load_lr_scheduler:
            # As in Nanotron, it begins anew where a run is resumed without it.
            step -= self.start.step
        return lambda peak: learning_rate(schedule, step, peak=peak)

    def _step(self, step: int, batch: Mapping[str, Tensor]) -> StepResult:
        return self.engine.step(
            **self._moved(batch),
            rate=self._rate(step),
            micro_batch_size=self.config.tokens.micro_batch_size,
        )

    def _verdict(self, failure: BaseException | None) -> _Verdict:
        """What all ranks say together, this one whether something has failed on it."""
        memory = peak_memory_bytes(self.mesh.device)
        is_failed, asked, most = self._most(failure is not None, self.stop.number or 0, memory)
        if asked:
            # The same on all ranks, some of which it may reach a moment later.
            self.stop.number = int(asked)
        return _Verdict(bool(is_failed), bool(asked), int(most))

    def _agree(self, failure: BaseException | None) -> None:
        """Raises the failure of the first rank that has one, and PeerFailed on every other."""
        if not self._verdict(failure).is_failed:
            return
        # A save that failed on another rank fails on this one as well, perhaps a moment later.
        failure = failure or self.saver.finished()
        is_own = failure is not None and not isinstance(failure, PeerFailed)
        world_size, rank = self.mesh.world_size, self.mesh.rank
        (backwards,) = self._most(world_size - rank if is_own else 0)
        first = world_size - int(backwards)
        if failure is not None and first == rank:
            raise failure
        raise PeerFailed(f"rank {first} failed, and has said why")

    def _leave(self, step: int, failure: BaseException | None) -> None:
        """Saves what was reached, where saving has not failed itself, and raises the failure."""
        (has_lost,) = self._most(self.saver.finished() is not None)
        if not has_lost and step > self.start.step:
            self._save(step)
        unsaved = self.saver.finished()
        self._agree(failure or unsaved)

    def _most(self, *said: float) -> list[float]:
        """Of each number the largest that a rank says."""
        mesh = self.mesh
        if mesh.world is None:
            return [float(each) for each in said]
        votes = torch.tensor(said, dtype=torch.float64, device=mesh.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=resolve_group(mesh.world))
        return [float(each) for each in votes.tolist()]

    def _metrics(
        self, step: int, loss: float, norm: float, seconds: float, memory: int
    ) -> StepMetrics:
        tokens, before = self.data.tokens(step), self.data.tokens(step - 1)
        device = self.mesh.device
        mfu = None
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            peak = peak_flops(name, self.config.model.dtype)
            if peak is not None:
                samples = self.config.global_batch_size
                length = (tokens - before) // samples
                flops = samples * flops_of_sequence(self.model, length)
                mfu = flops / seconds / peak / self.mesh.world_size
        return StepMetrics(
            step=step,
            loss=loss,
            learning_rate=self._rate(step)(
                self.config.optimizer.learning_rate_scheduler.learning_rate
            ),
            grad_norm=norm,
            tokens=tokens,
            tokens_per_second=(tokens - before) / seconds,
            mfu=mfu,
            memory_bytes=memory,
            seconds=seconds,
        )

    def _check(self, metrics: StepMetrics) -> None:
        """Ends a run that computes nothing any more. Raises TrainingError."""
        for name, value in (("loss", metrics.loss), ("norm of the gradient", metrics.grad_norm)):
            if not math.isfinite(value):
                self._agree(self.saver.finished())
                raise TrainingError(
                    f"step {metrics.step}: the {name} is {value}; the run ends without saving, and "
                    + self._kept()
                )

    def _held_out(self, step: int) -> list[MicroBatch]:
        """What a validation after a step sees; empty where it is not the time for one."""
        interval = self.config.tokens.val_check_interval
        return self.data.validation(step) if interval > 0 and step % interval == 0 else []

    def _validation_loss(self, held_out: Sequence[MicroBatch]) -> float:
        tensors = self._moved(self._joined(held_out))
        size = self.config.tokens.micro_batch_size
        return float(self.engine.step.evaluate(**tensors, micro_batch_size=size).item())

    def _save(self, step: int) -> None:
        """Copies what there is to save; another thread writes it.

        Raises what went wrong with the checkpoint before, as `_agree` does.
        """
        if self.saver.has_begun(step):
            return
        self._agree(self.saver.finished())
        mesh = self.mesh
        taken = snapshot(
            self.engine.trained,
            self.engine.frozen,
            self.engine.optimizer,
            mesh,
            self._rate(step + 1),
            zero_stage=self.config.optimizer.zero_stage,
        )
        stages = self.data.consumed(step)
        metadata = metadata_document(mesh, step=step, stages=stages, last_stage=len(stages) - 1)
        self.saver.start(step, taken, metadata)


def _tried(call: Callable[[], Value]) -> tuple[Value | None, Exception | None]:
    """What a call gives, or the error that all ranks have to hear of first."""
    try:
        return call(), None
    except (NanotronFastError, OSError) as error:
        return None, error


def _next(batches: Iterator[Value]) -> tuple[Value | None, BaseException | None, float]:
    """The next batch, or None where they are at an end; why it cannot be had; seconds it took."""
    begun = time.perf_counter()
    batch, failure = _tried(lambda: next(batches, None))
    return batch, failure, time.perf_counter() - begun
