"""A mixture of experts: a router sends each token to a few of them.

    p = softmax over all experts of x Wr^T, in fp32, or the sigmoid of each;  the top_k largest, as
    they are or made to sum to 1;  y = sum over those of p[e] * expert[e](x)  +
    sigmoid(x Wg^T) * shared(x), the latter with a gate or without one

Experts are whole on every tensor-parallel rank, as in Nanotron, and a rank computes them for the
tokens that it has: all of them in mode "all_reduce", its share in mode "reduce_scatter". Where the
experts of a layer are split over ranks (expert parallelism), tokens go to the ranks of their
experts and come back, within the ranks of the same tensor-parallel rank: `parallel.dispatch`. The
shared expert is computed while they are on their way there.

Auxiliary loss (Switch, Fedus et al., 2022; off unless it is asked for), of each layer by itself:
E * sum over experts of f * P, with f the choices of an expert over the tokens, and P its mean
probability, both of the tokens of this data-parallel rank. It is not part of the loss that the
decoder returns: its gradient joins in backward, so that no stage has to hand it on.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanotron_fast.kernels.runtime.collectives import all_reduce
from nanotron_fast.model.spec import Experts as ExpertsSpec
from nanotron_fast.models.batch import Batch
from nanotron_fast.models.mlp import Mlp, gated
from nanotron_fast.models.weights import Setting, Weights
from nanotron_fast.parallel.dispatch import Routes
from nanotron_fast.parallel.grouped import Runs, grouped_linear

# What keeps the sum of weights that are all 0 from dividing by 0.
_SMALLEST_SUM = 1e-20


class _Join(torch.autograd.Function):
    """x, which hands a loss a gradient of its own in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, Tensor, None]:
        (loss,) = ctx.saved_tensors
        return dx, torch.full_like(loss, ctx.weight), None


def _counts(by_expert: Tensor, num_experts: int) -> Tensor:
    """(experts,) int64: how often each stands in a sorted list.

    torch.bincount would wait for the device, twice: for the least and the largest of the list.
    """
    experts = torch.arange(num_experts, device=by_expert.device)
    ends = torch.searchsorted(by_expert, experts, right=True)
    return ends.diff(prepend=ends.new_zeros(1))


class MergedExperts(nn.Module):
    """The matrices of a rank's experts: (experts, hidden, 2 * inter) and (experts, inter, hidden).

    With biases: (experts, 2 * inter) and (experts, hidden).
    """

    merged_gate_up_proj: nn.Parameter
    merged_down_proj: nn.Parameter

    merged_gate_up_bias: nn.Parameter
    merged_down_bias: nn.Parameter

    def __init__(self, experts: ExpertsSpec, activation: str) -> None:
        super().__init__()
        self.spec, self.activation = experts, activation
        self.register_parameter("merged_gate_up_proj", None)
        self.register_parameter("merged_down_proj", None)
        if experts.has_bias:
            self.register_parameter("merged_gate_up_bias", None)
            self.register_parameter("merged_down_bias", None)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """What the experts make of their rows: (rows, hidden).

        Args:
            rows: (rows, hidden), in the order of the experts that they are for.
            counts: (experts,) int64, how many each gets.
        """
        runs = Runs(counts)
        packed = grouped_linear(rows, self.merged_gate_up_proj, runs)
        if not self.spec.has_bias:
            return grouped_linear(self._gated(packed), self.merged_down_proj, runs)
        places = torch.arange(len(rows), dtype=runs.ends.dtype, device=rows.device)
        expert = torch.searchsorted(runs.ends, places, right=True)
        packed = packed + self.merged_gate_up_bias[expert]
        out = grouped_linear(self._gated(packed), self.merged_down_proj, runs)
        return out + self.merged_down_bias[expert]

    def _gated(self, packed: Tensor) -> Tensor:
        if self.spec.clamped_glu is None:
            return gated(packed, self.activation)
        alpha, limit = self.spec.clamped_glu
        gate, up = packed.chunk(2, -1)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)


class Router(Weights):
    """Its weight, with a bias or without, gives scores; a correction bias decides with them who is
    chosen.

    `load` is how many of this rank's tokens each expert was chosen for since it was last None:
    (experts,) int64, of all ranks' experts.
    """

    correction_bias: nn.Parameter
    load: Tensor | None

    def __init__(self, experts: ExpertsSpec) -> None:
        super().__init__(may_have_bias=experts.has_bias)
        self.spec, self.load = experts, None
        if experts.has_correction_bias:
            self.register_parameter("correction_bias", None)


class Experts(nn.Module):
    """Takes and gives (tokens, hidden), or this rank's share of the tokens."""

    def __init__(self, experts: ExpertsSpec, setting: Setting) -> None:
        super().__init__()
        self.spec, self.setting = experts, setting
        # In the order of Nanotron's modules, by which an optimizer's file numbers its states.
        self.router = Router(experts)
        if experts.has_shared_expert:
            self.shared_expert = Mlp(setting)
        if experts.has_shared_expert and experts.has_shared_gate:
            self.shared_expert_gate = Weights()
        self.experts = MergedExperts(experts, setting.spec.hidden_act)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        bias = self.router.bias if self.spec.has_bias else None
        logits = F.linear(
            x.float(), self.router.weight.float(), None if bias is None else bias.float()
        )
        is_softmax = self.spec.scoring == "softmax"
        probabilities = logits.softmax(-1) if is_softmax else logits.sigmoid()
        weights, chosen = self._chosen(probabilities)
        by_expert, order = chosen.flatten().sort(stable=True)
        counts = _counts(by_expert, self.spec.num_experts)
        if batch.counts(self.router):
            load = self.router.load
            self.router.load = counts if load is None else load + counts
        if batch.auxiliary_loss and torch.is_grad_enabled():
            loss = self._imbalance(probabilities, counts)
            weights = _Join.apply(weights, loss, batch.auxiliary_loss)
        rows = x[order // self.spec.top_k]
        if self.setting.expert_ranks.size == 1:
            shared, out = self._shared(x), self.experts(rows, counts)
        else:
            routes = Routes(counts, self.setting.expert_ranks)
            under_way = routes.leave(rows)
            shared = self._shared(x)
            out = routes.bring_back(self.experts(routes.arrive(*under_way), routes.counts))
        scaled = out * weights.flatten()[order, None].to(x.dtype)
        # Each token's terms beside each other again, summed in the order of their weights.
        in_order = torch.empty_like(scaled).index_copy(0, order, scaled)
        out = in_order.unflatten(0, (-1, self.spec.top_k)).sum(1)
        return out if shared is None else out + shared

    def _shared(self, x: Tensor) -> Tensor | None:
        """Of the expert that all tokens share; None where there is none."""
        if not self.spec.has_shared_expert:
            return None
        out: Tensor = self.shared_expert(x)
        if not self.spec.has_shared_gate:
            return out
        return torch.sigmoid(F.linear(x, self.shared_expert_gate.weight)) * out

    def _chosen(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and the numbers of each token's experts: (tokens, top_k)."""
        spec = self.spec
        for_choice = scores.detach()
        if spec.has_correction_bias:
            for_choice = for_choice + self.router.correction_bias
        if spec.num_groups > 1:
            for_choice = self._of_best_groups(for_choice)
        chosen = for_choice.topk(spec.top_k, -1).indices
        weights = scores.gather(-1, chosen)
        if spec.is_renormalised:
            weights = weights / (weights.sum(-1, keepdim=True) + _SMALLEST_SUM)
        return weights if spec.scale == 1 else weights * spec.scale, chosen

    def _of_best_groups(self, scores: Tensor) -> Tensor:
        """The scores, with those of other groups below any: a group has its two best experts'."""
        spec = self.spec
        groups = scores.unflatten(-1, (spec.num_groups, -1))
        best = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)
        kept = best.topk(spec.top_k_groups, -1).indices
        is_kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, kept, value=True)
        return groups.masked_fill(~is_kept[..., None], -math.inf).flatten(-2)

    def _imbalance(self, probabilities: Tensor, counts: Tensor) -> Tensor:
        """This rank's share of the auxiliary loss: over the ranks of the group they sum to it."""
        num_experts = self.spec.num_experts
        counts = counts.to(torch.float32)
        total = len(probabilities)
        if self.setting.is_scattered:
            counts = all_reduce(counts, self.setting.ranks)
            total *= self.setting.ranks.size
        return num_experts * (counts / total * probabilities.sum(0) / total).sum()
