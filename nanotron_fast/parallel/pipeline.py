"""A pipeline of stages on torch.distributed.pipelining: the schedules, and a loop for one stage.

The shapes that stages send each other are told beforehand. Otherwise torch would find them by
passing empty tensors through forward and backward, and our functions would add the gradients of
those to `main_grad`. For the same reason the loss is computed within the last stage, so that its
output is one number, and gradients are scaled by scaling that number.

A schedule keeps its shapes, and a buffer for every micro-batch: there is one for each shape that
was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanotron_fast.errors import ConfigError, TopologyError
from nanotron_fast.kernels.runtime.collectives import Group, resolve

SCHEDULES = ("afab", "1f1b", "interleaved")
_ZERO_BUBBLE = (
    "they compute the gradients of weights apart from those of inputs, and our functions compute "
    "both in one pass"
)
_REFUSED = {
    "zb": _ZERO_BUBBLE,
    "zbv": _ZERO_BUBBLE,
    "zero_bubble": _ZERO_BUBBLE,
    "interleaved_zero_bubble": _ZERO_BUBBLE,
    "dualpipev": _ZERO_BUBBLE,
}


class _Shape(NamedTuple):
    """What a schedule is made for."""

    rows: int
    length: int
    num_micro_batches: int
    is_training: bool


class _Stage(nn.Module):
    """A part of the model as schedules call it.

    All parts of a rank are given the same keywords, and each hands on what its module takes. The
    last gives its micro-batch's share of the mean loss.
    """

    def __init__(self, part: nn.Module, shape: _Shape, *, is_last: bool) -> None:
        super().__init__()
        self.part, self.shape, self.is_last = part, shape, is_last

    def forward(self, x: Tensor, labels: Tensor | None = None, **tensors: Tensor) -> Tensor:
        if not self.is_last:
            return self.part(x, shape=(self.shape.rows, self.shape.length), **tensors)
        return self.part(x, labels=labels, **tensors) / self.shape.num_micro_batches


def check_schedule(schedule: str, num_micro_batches: int, *, pp: int, chunks: int = 1) -> None:
    """Whether a schedule can run so many micro-batches over so many stages.

    Args:
        schedule: one of SCHEDULES. With one rank it makes no difference.
        num_micro_batches: of a step.
        pp: ranks of the pipeline.
        chunks: stages on each rank.

    Raises ConfigError, which says what to change.
    """
    if schedule in _REFUSED:
        raise ConfigError(f"pipeline schedule {schedule!r} is not served: {_REFUSED[schedule]}")
    if schedule not in SCHEDULES:
        raise ConfigError(f"pipeline schedule {schedule!r}: choose {', '.join(SCHEDULES)}")
    if num_micro_batches < 1:
        raise ConfigError(f"{num_micro_batches} micro-batches: a step has at least one")
    if pp == 1:
        return
    if chunks > 1 and schedule != "interleaved":
        raise ConfigError(f"{chunks} stages on each rank: choose the schedule interleaved")
    # With one stage on each rank, the interleaved schedule is 1f1b.
    if schedule != "afab" and chunks == 1 and num_micro_batches < pp:
        raise ConfigError(
            f"schedule {schedule}: {num_micro_batches} micro-batches for {pp} stages leave some "
            "without work; accumulate at least as many as there are stages, or choose afab"
        )
    rounds = max(1, num_micro_batches // pp)
    if schedule == "interleaved" and num_micro_batches % rounds:
        raise ConfigError(
            f"schedule interleaved: {num_micro_batches} micro-batches do not divide into {rounds} "
            f"equal rounds over {pp} ranks; accumulate a multiple of {pp}"
        )


class Pipeline:
    """The parts of a model that this rank holds, and how micro-batches pass through all of them.

    A part is a module. The first of the model takes token ids (rows, length) int64, every other one
    activations (tokens, hidden) in `dtype`. The last is given `labels` and gives a loss, fp32 and
    scalar; every other one gives activations. Those that are not last are given
    `shape=(rows, length)`.

    Args:
        parts: those of this rank, from the front of the model to its end. Part c of pipeline rank r
            is stage c * pp + r of the model.
        group: of pipeline parallelism: a ProcessGroup, a DeviceMesh of one dimension, or None.
        schedule: "afab" (all forward, all backward: GPipe), "1f1b", or "interleaved" for several
            parts on each rank.
        hidden_size: features of the activations.
        dtype: of the activations.
        device: where they are.
        tokens_split: by how many ranks the tokens of a micro-batch are shared out between the
            stages: the size of the tensor-parallel group in mode "reduce_scatter", else 1.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        *,
        group: Group = None,
        schedule: str = "afab",
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        tokens_split: int = 1,
    ) -> None:
        ranks = resolve(group)
        check_schedule(schedule, ranks.size, pp=ranks.size, chunks=len(parts))
        if not parts or (ranks.size == 1 and len(parts) > 1):
            raise ConfigError(f"{len(parts)} parts of a model for {ranks.size} pipeline ranks")
        self._parts, self._schedule_name = list(parts), schedule
        self._group = None if ranks.size == 1 else _process_group(ranks.name)
        self._rank, self._size = ranks.rank, ranks.size
        self._hidden_size, self._dtype, self._device = hidden_size, dtype, device
        self._tokens_split = tokens_split
        self._made: dict[_Shape, Any] = {}

    @property
    def parts(self) -> Sequence[nn.Module]:
        """Those of this rank."""
        return self._parts

    @property
    def is_first(self) -> bool:
        """Whether this rank takes the token ids."""
        return self._rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank computes the loss."""
        return self._rank == self._size - 1

    def step(
        self, input_ids: Tensor, labels: Tensor, *, micro_batch_size: int, **tensors: Tensor
    ) -> Tensor | None:
        """Forward and backward of all micro-batches; gradients are of the mean of their losses.

        Args:
            input_ids, labels: (micro-batches * micro_batch_size, length) int64, on every rank.
            micro_batch_size: rows that pass through the model together.
            tensors: more of that shape, which every part is given: `position_ids`.

        Returns:
            The mean loss, fp32 and detached, on the last rank of the pipeline; else None.

        Raises:
            ConfigError: the schedule does not run so many micro-batches. TopologyError: rows do not
            divide into micro-batches, or their tokens over ranks.
        """
        shape = self._shape(input_ids, micro_batch_size, is_training=True)
        inputs = {"labels": labels, **tensors}
        if self._group is None:
            losses = []
            for ids, keywords in self._micro_batches(input_ids, inputs, shape):
                loss = self._one_stage(shape)(ids, **keywords)
                loss.backward()
                losses.append(loss.detach())
            return torch.stack(losses).sum()
        with torch.enable_grad():
            return self._run(self._made_for(shape).step, input_ids, inputs)

    @torch.no_grad()
    def evaluate(
        self, input_ids: Tensor, labels: Tensor, *, micro_batch_size: int, **tensors: Tensor
    ) -> Tensor | None:
        """The mean loss of all micro-batches, without gradients. As `step` otherwise."""
        shape = self._shape(input_ids, micro_batch_size, is_training=False)
        inputs = {"labels": labels, **tensors}
        if self._group is None:
            stage = self._one_stage(shape)
            batches = self._micro_batches(input_ids, inputs, shape)
            return torch.stack([stage(ids, **keywords) for ids, keywords in batches]).sum()
        return self._run(self._made_for(shape).eval, input_ids, inputs)

    def _shape(self, input_ids: Tensor, micro_batch_size: int, *, is_training: bool) -> _Shape:
        rows, length = input_ids.shape
        if micro_batch_size < 1 or rows % micro_batch_size:
            raise TopologyError(
                f"{rows} rows do not divide into micro-batches of {micro_batch_size}"
            )
        if micro_batch_size * length % self._tokens_split:
            raise TopologyError(
                f"{micro_batch_size} rows of {length} tokens do not divide over "
                f"tp={self._tokens_split}"
            )
        return _Shape(micro_batch_size, length, rows // micro_batch_size, is_training)

    def _run(self, step: Any, input_ids: Tensor, inputs: dict[str, Tensor]) -> Tensor | None:
        losses: list[Tensor] = []
        ids = (input_ids,) if self.is_first else ()
        if not self.is_last:
            step(*ids, return_outputs=False, **_without_labels(inputs))
            return None
        # The target is what schedules count a loss by; the loss itself is there already.
        step(*ids, target=inputs["labels"], losses=losses, return_outputs=False, **inputs)
        return torch.stack([loss.detach() for loss in losses]).sum()

    def _micro_batches(
        self, input_ids: Tensor, inputs: dict[str, Tensor], shape: _Shape
    ) -> list[tuple[Tensor, dict[str, Tensor]]]:
        split = {name: tensor.split(shape.rows) for name, tensor in inputs.items()}
        return [
            (ids, {name: pieces[number] for name, pieces in split.items()})
            for number, ids in enumerate(input_ids.split(shape.rows))
        ]

    def _one_stage(self, shape: _Shape) -> nn.Module:
        if shape not in self._made:
            self._made[shape] = _Stage(self._parts[0], shape, is_last=True)
        return self._made[shape]

    def _made_for(self, shape: _Shape) -> Any:
        if shape not in self._made:
            self._made[shape] = self._make(shape)
        return self._made[shape]

    def _make(self, shape: _Shape) -> Any:
        from torch.distributed import pipelining

        count = shape.num_micro_batches
        if shape.is_training:
            check_schedule(self._schedule_name, count, pp=self._size, chunks=len(self._parts))
        stages = [self._stage(part, chunk, shape) for chunk, part in enumerate(self._parts)]
        options = {"loss_fn": _loss, "scale_grads": False}
        # Without backward the order makes no difference, and these two take any number.
        if len(stages) > 1:
            several = (
                pipelining.ScheduleInterleaved1F1B
                if shape.is_training
                else pipelining.ScheduleLoopedBFS
            )
            return several(stages, count, **options)
        is_afab = self._schedule_name == "afab" or not shape.is_training
        one = pipelining.ScheduleGPipe if is_afab else pipelining.Schedule1F1B
        return one(stages[0], count, **options)

    def _stage(self, part: nn.Module, chunk: int, shape: _Shape) -> Any:
        from torch.distributed.pipelining import PipelineStage

        index, number = chunk * self._size + self._rank, self._size * len(self._parts)
        tokens = shape.rows * shape.length // self._tokens_split
        activations = torch.empty(
            tokens, self._hidden_size, dtype=self._dtype, device="meta", requires_grad=True
        )
        ids = torch.empty(shape.rows, shape.length, dtype=torch.int64, device="meta")
        loss = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
        is_last = index == number - 1
        return PipelineStage(
            _Stage(part, shape, is_last=is_last),
            index,
            number,
            self._device,
            input_args=ids if index == 0 else activations,
            output_args=loss if is_last else activations,
            group=self._group,
        )


def _loss(output: Tensor, target: Tensor) -> Tensor:
    """The last stage's output is the loss."""
    return output


def _without_labels(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in inputs.items() if name != "labels"}


def _process_group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)
