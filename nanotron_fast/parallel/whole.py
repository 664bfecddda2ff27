"""What the heads or columns of all ranks take of a value that is not split over them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from nanotron_fast.kernels.runtime.collectives import (
    Group,
    Ranks,
    all_gather,
    all_reduce,
    reduce_scatter,
    resolve,
)
from nanotron_fast.kernels.runtime.once import once_differentiable
from nanotron_fast.parallel.communication import check_mode


class _Copied(torch.autograd.Function):
    """x, whose gradient is the sum over the ranks that go on with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    @once_differentiable("for_all_ranks")
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return all_reduce(dx.clone(), ctx.ranks), None


class _Gathered(torch.autograd.Function):
    """All ranks' tokens; each gets the gradient of its own, summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return all_gather(x.contiguous(), ranks).flatten(0, 1)

    @staticmethod
    @once_differentiable("for_all_ranks")
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(dx.contiguous(), ctx.ranks), None


class GatheredWhole(torch.autograd.Function):
    """All ranks' tokens, for work whose gradient is whole on every rank: each takes its own of it.

    `apply(x, ranks)`: (tokens / size, ...) of each rank -> (tokens, ...).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return all_gather(x, ranks).flatten(0, 1)

    @staticmethod
    @once_differentiable("a gather of tokens")
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx.chunk(ctx.ranks.size)[ctx.ranks.rank].contiguous(), None


def for_all_ranks(x: Tensor, *, group: Group, mode: str) -> Tensor:
    """A value of every token, for work that is split over ranks, as a column linear takes it.

    Args:
        x: (tokens, ...), the same on every rank; with mode "reduce_scatter" (tokens / size, ...),
            this rank's tokens.
        group: a ProcessGroup, a DeviceMesh of one dimension, or None for a rank alone.
        mode: "all_reduce" or "reduce_scatter".

    Returns:
        (tokens, ...) on every rank.
    """
    check_mode(mode)
    ranks = resolve(group)
    if ranks.size == 1:
        return x
    kind = _Gathered if mode == "reduce_scatter" else _Copied
    return cast(Tensor, kind.apply(x, ranks))
