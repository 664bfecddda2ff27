"""A norm over values of which each rank of a group has a part."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from nanotron_fast.kernels.rms_norm import rms_norm
from nanotron_fast.kernels.runtime.collectives import Ranks, all_reduce
from nanotron_fast.kernels.runtime.once import once_differentiable


class _SumOverRanks(torch.autograd.Function):
    """The sum, which every rank goes on with: so its gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return all_reduce(x.clone(), ranks)

    @staticmethod
    @once_differentiable("rms_norm_over_ranks")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return all_reduce(dy.clone(), ctx.ranks), None


def rms_norm_over_ranks(x: Tensor, weight: Tensor, eps: float, width: int, ranks: Ranks) -> Tensor:
    """RMSNorm of rows that are split over a group: x / sqrt(mean of x^2 over all ranks + eps) * w.

    Args:
        x: (tokens, width / size), this rank's columns.
        weight: (width / size,), this rank's.
        width: of the columns of all ranks together.

    Returns:
        x's shape and dtype.
    """
    if ranks.size == 1:
        return cast(Tensor, rms_norm(x, weight, eps))
    wide = x.float()
    squares = cast(Tensor, _SumOverRanks.apply(wide.square().sum(-1, keepdim=True), ranks))
    return (wide * torch.rsqrt(squares / width + eps) * weight.float()).to(x.dtype)
