"""Gradients of a step: summed in fp32 over micro-batches and ranks, and measured.

Every parameter has a `main_grad` in fp32, all of them in one buffer. Our fused functions add to it
themselves; what other functions give as `grad` is added when autograd has finished it, and let go.
The order of `reduce` is that of what depends on what: over tensor-parallel ranks where each has
seen its own tokens alone, over data-parallel ranks, over the two copies of a tied matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nanotron_fast.errors import ConfigError
from nanotron_fast.kernels.optimizer import get_total_norm
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.parameters import Trained
from nanotron_fast.train.zero import reduce_to_runs, sum_over

# Addresses that wide accesses and reductions like.
_ALIGNMENT = 64


class Gradients:
    """The gradients of a rank's parameters.

    Args:
        trained: the parameters. Each is given its `main_grad`, zero.
        zero_stage: with 1 a rank has the sums of its own runs alone after `reduce`.
    """

    def __init__(self, trained: Sequence[Trained], mesh: Mesh, *, zero_stage: int) -> None:
        # Those that are summed over tensor-parallel ranks lie together, in front.
        self._in_order = sorted(trained, key=lambda each: not each.facts.sums_over_tp)
        self._mesh, self._zero_stage = mesh, zero_stage
        self._trained = list(trained)
        sizes = [math.ceil(each.num_elements / _ALIGNMENT) * _ALIGNMENT for each in self._in_order]
        self._buffer = torch.zeros(sum(sizes), dtype=torch.float32, device=mesh.device)
        at = 0
        self._num_summed_over_tp = 0
        for each, size in zip(self._in_order, sizes, strict=True):
            parameter = each.tensor
            parameter.main_grad = self._buffer[at : at + each.num_elements].view_as(parameter)
            parameter.register_post_accumulate_grad_hook(_add_to_main_grad)
            at += size
            if each.facts.sums_over_tp:
                self._num_summed_over_tp = at

    @property
    def shares(self) -> list[Tensor]:
        """This rank's run of each gradient, in the order of the parameters: flat views, fp32."""
        return [each.share(each.tensor.main_grad) for each in self._trained]

    @torch.no_grad()
    def reduce(self) -> None:
        """Sums over the ranks that have parts of the same gradients.

        Over data-parallel ranks it is the sum too, and no mean: see `scale`.
        """
        mesh = self._mesh
        if self._num_summed_over_tp:
            sum_over(self._buffer[: self._num_summed_over_tp], mesh.tp_group)
        if mesh.dp > 1:
            if self._zero_stage > 0:
                grads = [each.tensor.main_grad for each in self._in_order]
                reduce_to_runs(grads, mesh.dp_group)
            else:
                sum_over(self._buffer, mesh.dp_group)
        for each in self._trained:
            if each.facts.tied_with is not None and mesh.tied_group is not None:
                sum_over(each.share(each.tensor.main_grad), mesh.tied_group)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The norm of the mean gradient of all parameters of the model, each value counted once.

        fp32, 0-d, the same on every rank. After `reduce`; every rank calls it.
        """
        counted = [
            share
            for each, share in zip(self._trained, self.shares, strict=True)
            if each.is_counted and share.numel()
        ]
        norm = get_total_norm(counted, 2.0, self._mesh.world, device=self._mesh.device)
        return norm / self._mesh.dp

    def scale(self, norm: Tensor, max_norm: float | None) -> Tensor:
        """What to multiply the sums by: 1 / dp for the mean, and by Nanotron's factor of clipping.

            min(1, max_norm / (norm + 1e-6))

        Args:
            norm: as `norm` gives it.
            max_norm: None does not clip.
        """
        scale = torch.full_like(norm, 1 / self._mesh.dp)
        if max_norm is not None:
            scale *= (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return scale

    def clear(self) -> None:
        """Sets all of them to zero."""
        self._buffer.zero_()


@torch.no_grad()
def _add_to_main_grad(parameter: nn.Parameter) -> None:
    if parameter.grad is None:
        return
    if parameter.grad.is_sparse:
        raise ConfigError("a sparse gradient cannot be added to a main gradient")
    parameter.main_grad.add_(parameter.grad)
    parameter.grad = None
