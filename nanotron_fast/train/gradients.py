"""Gradients of a step: summed in fp32 over micro-batches and ranks, and measured.

Every parameter has a `main_grad` in fp32, all of them in one buffer. Our fused functions add to it
themselves; what other functions give as `grad` is added when autograd has finished it, and let go.
A layer's sums over data-parallel ranks are started when the last micro-batch's backward has left
it, and are under way while the layers before it compute; `reduce` waits for them, and adds what the
two copies of a tied matrix have, and those of a key-value head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from nanotron_fast.errors import ConfigError
from nanotron_fast.kernels.optimizer import get_total_norm
from nanotron_fast.kernels.runtime.collectives import Group
from nanotron_fast.models.architecture import Block
from nanotron_fast.models.decoder import Decoder
from nanotron_fast.train.buckets import Buckets
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.parameters import Trained
from nanotron_fast.train.zero import sum_over


class Gradients:
    """The gradients of a rank's parameters.

    Args:
        trained: the parameters. Each is given its `main_grad`, zero; with ZeRO-3 those that no rank
            has whole have their sums in `grad`, which fully_shard adds to.
        zero_stage: with 1 a rank has the sums of its own runs alone after `reduce`.
        copies: by the number of copies of a key-value head, the ranks that have this rank's.
    """

    def __init__(
        self,
        trained: Sequence[Trained],
        mesh: Mesh,
        *,
        zero_stage: int,
        copies: Mapping[int, Group] = MappingProxyType({}),
    ) -> None:
        self._mesh, self._copies = mesh, copies
        self._trained = list(trained)
        whole = [each for each in trained if not each.is_by_rows]
        self._buckets = Buckets(whole, mesh, zero_stage=zero_stage if zero_stage == 1 else 0)
        for each in whole:
            each.tensor.register_post_accumulate_grad_hook(_add_to_main_grad)

    def watch(self, parts: Iterable[nn.Module]) -> None:
        """Takes the sums of these decoders' layers while backward goes on, see `begin`."""
        for part in parts:
            if isinstance(part, Decoder):
                self._buckets.watch(part)

    def begin(self, num_micro_batches: int) -> None:
        """Before the micro-batches of a step: with the last of them sums may be started."""
        self._buckets.begin(num_micro_batches)

    @property
    def started(self) -> frozenset[Block]:
        """The blocks whose sums over data-parallel ranks are started, until `reduce` is done.

        "head" is all that is behind the last layer, "embedding" what is before the first.
        """
        return frozenset(self._buckets.started)

    @property
    def shares(self) -> list[Tensor]:
        """This rank's run of each gradient, in the order of the parameters: flat views, fp32."""
        return [_share(each) for each in self._trained]

    @torch.no_grad()
    def reduce(self) -> None:
        """Sums over the ranks that have parts of the same gradients.

        Over data-parallel ranks it is the sum too, and no mean: see `scale`.
        """
        self._buckets.reduce()
        for each in self._trained:
            if each.is_by_rows and each.facts.sums_over_tp and each.run[0] < each.run[1]:
                sum_over(_share(each), self._mesh.tp_group)
            if each.facts.tied_with is not None and each.run[0] < each.run[1]:
                sum_over(_share(each), self._mesh.tied_group)
            first, end = each.copied
            if first < end:
                sum_over(_share(each)[first:end], self._copies[each.facts.copies])

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The norm of the mean gradient of all parameters of the model, each value counted once.

        fp32, 0-d, the same on every rank. After `reduce`; every rank calls it.
        """
        counted = [
            part
            for each, share in zip(self._trained, self.shares, strict=True)
            if each.is_counted
            for part in each.counted(share)
            if part.numel()
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
        self._buckets.buffer.zero_()
        for each in self._trained:
            if each.is_by_rows:
                each.tensor.grad = None


def _share(trained: Trained) -> Tensor:
    """This rank's run of a gradient, to be written to."""
    if not trained.is_by_rows:
        return trained.share(trained.tensor.main_grad)
    if trained.tensor.grad is None:  # the step has not come by it
        trained.tensor.grad = torch.zeros_like(trained.tensor)
    return trained.share(trained.tensor.grad)


@torch.no_grad()
def _add_to_main_grad(parameter: nn.Parameter) -> None:
    if parameter.grad is None:
        return
    if parameter.grad.is_sparse:
        raise ConfigError("a sparse gradient cannot be added to a main gradient")
    parameter.main_grad.add_(parameter.grad)
    parameter.grad = None
