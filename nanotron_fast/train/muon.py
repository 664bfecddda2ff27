"""Muon for the hidden matrices, AdamW for everything else.

    m <- lerp(m, g, 1 - momentum)                      u = lerp(g, m, momentum), or m
    W <- (1 - lr * decay) W - lr * 0.2 sqrt(max(rows, columns)) * orthogonal(u)

The factor gives the update AdamW's size, so that AdamW's learning rates and decays carry over.
torch.optim.Muon with adjust_lr_fn="match_rms_adamw" is the same. Source: Liu et al., "Muon is
Scalable for LLM Training" (arXiv:2502.16982).

A matrix is orthogonal as a whole, so its parts have to meet: each rank keeps the momentum of its
run alone, sends it to the rank of its stage that computes with that matrix, and gets the update of
its run back. The matrices are shared out among all ranks of the stage, and the next are on their
way while the last are computed with. Those of experts that are split over ranks are shared out
among the ranks that have the same experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanotron_fast.kernels.runtime.collectives import Ranks
from nanotron_fast.parallel.communication import Pending, start_all_to_all
from nanotron_fast.train.matrices import Matrices, Round, rounds_of
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.optimizer import AdamW, Group, multiply_, own_run
from nanotron_fast.train.orthogonal import orthogonal
from nanotron_fast.train.parameters import Trained

MOMENTUM = "momentum_buffer"
# The root mean square of AdamW's updates, as it is usually found.
_ADAMW_RMS = 0.2


class Muon(AdamW):
    """The optimizer of a rank.

    Args:
        momentum: of the gradients of hidden matrices.
        nesterov: look one step ahead of it.
        ns_steps: iterations of Newton and Schulz.
        ns_dtype: of their products, and of what ranks send each other; by default bf16 on a GPU and
            fp32 on a CPU.
        others: as of AdamW. Betas and eps are for what is no hidden matrix.
    """

    def __init__(
        self,
        trained: Sequence[Trained],
        mesh: Mesh,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_dtype: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        super().__init__(trained, mesh, **others)
        self.momentum, self.nesterov, self.ns_steps = momentum, nesterov, ns_steps
        by_default = torch.float32 if mesh.device.type == "cpu" else torch.bfloat16
        self._ns_dtype = ns_dtype or by_default
        self._rounds = {
            group: rounds_of(((place, trained[place]) for place in group.places), mesh)
            for group in self._groups.values()
            if group.moments == (MOMENTUM,)
        }

    def moments_of(self, trained: Trained) -> tuple[str, ...]:
        return (MOMENTUM,) if trained.facts.is_hidden_matrix else super().moments_of(trained)

    def options_of(self, trained: Trained) -> dict[str, Any]:
        if not trained.facts.is_hidden_matrix:
            return super().options_of(trained)
        return {"momentum": self.momentum, "nesterov": self.nesterov, "ns_steps": self.ns_steps}

    def _step_group(
        self, group: Group, shares: list[Tensor], lr: float, scale: Tensor | None
    ) -> None:
        if group not in self._rounds:
            super()._step_group(group, shares, lr, scale)
            return
        if scale is not None:
            multiply_([shares[place] for place in group.places], scale)
        decay = 1 - lr * group.weight_decay
        under_way: tuple[Round, Pending] | None = None
        for each in self._rounds[group]:
            following = each, self._start(each, shares)
            if under_way is not None:
                self._finish(*under_way, lr, decay)
            under_way = following
        if under_way is not None:
            self._finish(*under_way, lr, decay)

    def _start(self, each: Round, shares: list[Tensor]) -> Pending:
        """Moves the momentum of a round's matrices on, and sends what is to be made orthogonal."""
        updates = []
        for lot, own, count in zip(each.lots, each.own, each.sent, strict=False):
            run = _within(own, lot)
            grad = shares[lot.place][run]
            momentum = self.states[lot.place].moments[MOMENTUM][run]
            momentum.lerp_(grad, 1 - self.momentum)
            if count:
                update = grad.lerp(momentum, self.momentum) if self.nesterov else momentum
                updates.append(update.to(self._ns_dtype))
        return self._exchange(updates, each.ranks, each.sent, each.received)

    def _finish(self, each: Round, pending: Pending, lr: float, decay: float) -> None:
        """Makes this rank's lot orthogonal, and steps its runs of all of the round's matrices."""
        results = []
        received = pending.wait()
        if each.returned:
            lot = each.lots[each.ranks.rank]
            update = self._update(lot, received, each.received)
            for tp_rank, (first, end) in each.returned:
                part = lot.part(update, tp_rank)
                results.append(part[first - lot.run[0] : end - lot.run[0]])
        back = [end - first for first, end in each.own]
        back += [0] * (each.ranks.size - len(back))
        sent = [end - first for _, (first, end) in each.returned] or [0] * each.ranks.size
        updates = self._exchange(results, each.ranks, sent, back).wait().split(back)
        for lot, own, update in zip(each.lots, each.own, updates, strict=False):
            run = _within(own, lot)
            state = self.states[lot.place]
            master = state.master[run]
            master.mul_(decay)
            master.add_(update, alpha=-lr * (_ADAMW_RMS * math.sqrt(max(lot.whole_shape))))
            if state.trained.tensor.dtype != torch.float32:
                own_run(state.trained)[run].copy_(master)

    def _update(self, lot: Matrices, received: Tensor, counts: Sequence[int]) -> Tensor:
        """The orthogonal matrices of a lot, whose parts have come from every rank."""
        pieces = received.split(list(counts))
        tp = self._mesh.tp
        parts = [torch.cat(pieces[tp_rank::tp]) for tp_rank in range(tp)]
        if lot.split is None:
            parts = [parts[self._mesh.tp_rank]]
        return orthogonal(lot.joined(parts), steps=self.ns_steps, dtype=self._ns_dtype)

    def _exchange(
        self,
        pieces: Sequence[Tensor],
        ranks: Ranks,
        sent: Sequence[int],
        received: Sequence[int],
    ) -> Pending:
        empty = torch.empty(0, dtype=self._ns_dtype, device=self._mesh.device)
        joined = torch.cat(list(pieces)) if pieces else empty
        return start_all_to_all(joined, ranks, sent=sent, received=received)


def _within(part: tuple[int, int], lot: Matrices) -> slice:
    """A part of the flattened shard, as a part of this rank's run."""
    start = lot.trained.run[0]
    return slice(part[0] - start, part[1] - start)
