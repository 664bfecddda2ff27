"""Rows that go to the ranks whose experts they are for, and come back the same way.

Rank r of the group has experts r * n to (r + 1) * n - 1, n being the experts of a rank. Rows leave
in the order of their experts. Where they arrive they lie in that order again: those of a rank's
first expert from all ranks, then those of its second.

    there      x[rows of rank r]  ->  rank r, sorted by expert
    back       y[rows of rank s]  ->  rank s, in the order in which they left

A trip begins with `leave`, and `arrive` waits for it: what is computed between the two runs beside
it. In backward the gradients go the other way, begun where the trip had arrived, and waited for
where it had begun: beside the backward pass of the same computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nanotron_fast.kernels.runtime.collectives import Ranks
from nanotron_fast.kernels.runtime.once import once_differentiable
from nanotron_fast.parallel.communication import Pending, start_all_to_all


class _Trip:
    """Rows on their way in one direction, and their gradients in the other.

    Args:
        sent, received: rows to each rank, and from it.
        before: the order that rows are put into before they leave; None for their own.
        after: likewise when they have arrived.
    """

    def __init__(
        self,
        ranks: Ranks,
        sent: Sequence[int],
        received: Sequence[int],
        *,
        before: Tensor | None = None,
        after: Tensor | None = None,
    ) -> None:
        self._ranks, self._sent, self._received = ranks, sent, received
        self._before, self._after = before, after
        self._pending: Pending | None = None

    def start(self, rows: Tensor) -> Tensor:
        """What will arrive; it is not to be read before `finish`."""
        if self._before is not None:
            rows = rows.index_select(0, self._before)
        self._pending = start_all_to_all(
            rows, self._ranks, sent=self._sent, received=self._received
        )
        return self._pending.tensor

    def finish(self) -> Tensor:
        """Waits for what has been started: the rows, in the order of `after`."""
        assert self._pending is not None
        rows, self._pending = self._pending.wait(), None
        return rows if self._after is None else rows.index_select(0, self._after)

    @cached_property
    def back(self) -> _Trip:
        """Of the gradients."""
        return _Trip(
            self._ranks,
            self._received,
            self._sent,
            before=_inverse(self._after),
            after=_inverse(self._before),
        )


def _inverse(order: Tensor | None) -> Tensor | None:
    if order is None:
        return None
    return torch.empty_like(order).index_copy_(
        0, order, torch.arange(len(order), device=order.device)
    )


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return trip.start(rows)

    @staticmethod
    @once_differentiable("a trip to experts")
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.back.finish(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, under_way: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        rows = trip.finish()
        return rows.view_as(rows) if rows is under_way else rows

    @staticmethod
    @once_differentiable("a trip to experts")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # What it hands on stands for the gradient, which is under way to `_Leave`.
        ctx.trip.back.start(gradient)
        return gradient, None


class Routes:
    """Where a rank's rows go. Made by all ranks of the group; waits for the device, once.

    Args:
        counts: (experts,) int64, of all ranks: the rows of this rank that each expert gets.
        ranks: of the group, by which the experts divide.

    Attributes:
        counts: (experts of this rank,): the rows that each of them gets from all ranks.
    """

    def __init__(self, counts: Tensor, ranks: Ranks) -> None:
        size = ranks.size
        self._ranks = ranks
        leaving = counts.view(size, -1)
        one_each = [1] * size
        arriving = start_all_to_all(leaving, ranks, sent=one_each, received=one_each).wait()
        self.counts = arriving.sum(0)
        numbers: list[list[int]] = torch.stack((leaving.sum(1), arriving.sum(1))).tolist()
        self._sent, self._received = numbers
        experts = torch.arange(arriving.shape[1], device=counts.device).repeat(size)
        of_rows = experts.repeat_interleave(arriving.flatten(), output_size=sum(self._received))
        self._by_expert = of_rows.argsort(stable=True)

    def leave(self, rows: Tensor) -> tuple[Tensor, _Trip]:
        """Sends rows (rows, width), sorted by their experts. `arrive` takes what it gives."""
        trip = _Trip(self._ranks, self._sent, self._received, after=self._by_expert)
        return _Leave.apply(rows, trip), trip

    def arrive(self, under_way: Tensor, trip: _Trip) -> Tensor:
        """This rank's experts' rows of all ranks, in the order of the experts."""
        rows: Tensor = _Arrive.apply(under_way, trip)
        return rows

    def bring_back(self, rows: Tensor) -> Tensor:
        """Rows as `arrive` gave them, on the ranks that they came from, as they left."""
        before = _inverse(self._by_expert)
        trip = _Trip(self._ranks, self._received, self._sent, before=before)
        return self.arrive(_Leave.apply(rows, trip), trip)
