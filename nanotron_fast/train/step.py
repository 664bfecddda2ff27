"""One step of training: micro-batches through the pipeline, gradients, clipping, the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanotron_fast.parallel.pipeline import Pipeline
from nanotron_fast.train.balance import Balance
from nanotron_fast.train.gradients import Gradients
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.optimizer import AdamW, Rate
from nanotron_fast.train.zero import sum_over


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step tells. Tensors on the device, so that nothing waits for it before it is asked.

    Args:
        loss: the mean over the global batch, before the update; fp32, 0-d.
        grad_norm: of the mean gradient of all parameters, before clipping; fp32, 0-d.
    """

    loss: Tensor
    grad_norm: Tensor


class TrainingStep:
    """What a rank does in each step.

    Args:
        pipeline: the model.
        max_norm: of the gradient; None does not clip.
        balance: of the experts; None leaves it as it is.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        gradients: Gradients,
        optimizer: AdamW,
        mesh: Mesh,
        *,
        max_norm: float | None,
        balance: Balance | None = None,
    ) -> None:
        self.pipeline, self.gradients, self.optimizer = pipeline, gradients, optimizer
        self._mesh, self._max_norm, self._balance = mesh, max_norm, balance
        gradients.watch(pipeline.parts)

    def __call__(
        self,
        input_ids: Tensor,
        labels: Tensor,
        rate: Rate,
        *,
        micro_batch_size: int,
        **tensors: Tensor,
    ) -> StepResult:
        """Takes a step on this data-parallel rank's part of the global batch.

        Args:
            input_ids, labels: (rows, length) int64, the same on all tensor- and pipeline-parallel
                ranks; a label of -100 counts for nothing.
            rate: the learning rate of this step, from a parameter's highest one.
            micro_batch_size: rows that pass through the model together.
            tensors: as of `Pipeline.step`.
        """
        self.gradients.begin(len(input_ids) // micro_batch_size)
        loss = self.pipeline.step(input_ids, labels, micro_batch_size=micro_batch_size, **tensors)
        self.gradients.reduce()
        norm = self.gradients.norm()
        scale = None
        if self._mesh.dp > 1 or self._max_norm is not None:
            scale = self.gradients.scale(norm, self._max_norm)
        self.optimizer.step(self.gradients.shares, rate, scale)
        self.gradients.clear()
        if self._balance is not None:
            self._balance.step()
        return StepResult(self._over_all(loss), norm)

    def evaluate(
        self, input_ids: Tensor, labels: Tensor, *, micro_batch_size: int, **tensors: Tensor
    ) -> Tensor:
        """The mean loss over the global batch, without a step; the same on every rank."""
        loss = self.pipeline.evaluate(
            input_ids, labels, micro_batch_size=micro_batch_size, **tensors
        )
        return self._over_all(loss)

    def _over_all(self, loss: Tensor | None) -> Tensor:
        """The mean over data-parallel ranks, from the last stage to every rank."""
        mesh = self._mesh
        if mesh.world is None:
            assert loss is not None
            return loss
        # Every tensor-parallel rank of the last stage has the same; one of them counts.
        is_counted = loss is not None and mesh.tp_rank == 0
        total = torch.zeros((), dtype=torch.float32, device=mesh.device)
        if is_counted:
            total.copy_(loss)
        sum_over(total, mesh.world)
        return total / mesh.dp
