"""Linear layer and cross entropy chunk by chunk, as operators: `linear_cross_entropy` says why.

Everything runs in one call of an operator, so that one buffer of logits serves all chunks in eager
mode and under torch.compile alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanotron_fast.kernels.cross_entropy.operators import combine, gradient_, statistics
from nanotron_fast.kernels.runtime.collectives import Ranks, all_gather, sum_in_background
from nanotron_fast.kernels.runtime.operators import operator

# How many logits a chunk has at most: 1 GiB of bf16.
_CHUNK_LOGITS = 2**29


class Settings(NamedTuple):
    """What both operators are given beside tensors. `chunk_tokens` is 0 where they choose."""

    ranks: Ranks
    ignore_index: int | None
    z_loss: float
    add_maximum: bool
    chunk_tokens: int

    def named(self) -> dict[str, Any]:
        """The operators' arguments of these names."""
        return {
            "group_name": self.ranks.name,
            "rank": self.ranks.rank,
            "size": self.ranks.size,
            "ignore_index": self.ignore_index,
            "z_loss": self.z_loss,
            "add_maximum": self.add_maximum,
            "chunk_tokens": self.chunk_tokens,
        }


def default_chunk_tokens(num_tokens: int, num_cols: int) -> int:
    """As many tokens as fill the buffer, split evenly into at least two chunks."""
    most = max(_CHUNK_LOGITS // num_cols, 128)
    num_chunks = max(-(-num_tokens // most), 2)
    chunk = -(-num_tokens // num_chunks)
    # Whole tiles of a matrix product, where that costs little.
    return chunk if chunk < 1024 else -(-chunk // 128) * 128


def _add_product(total: Tensor, dlogits: Tensor, hidden: Tensor, beta: int) -> None:
    """total = beta * total + dlogits^T @ hidden, in the total's dtype."""
    if total.dtype == hidden.dtype:
        total.addmm_(dlogits.t(), hidden, beta=beta)
    elif total.is_cuda:
        torch.addmm(total, dlogits.t(), hidden, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(dlogits.t().to(total.dtype), hidden.to(total.dtype), beta=beta)


def _empty_gradients(
    hidden: Tensor, weight: Tensor, of_hidden: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (
        hidden.new_empty(hidden.shape if of_hidden else (0,)),
        weight.new_empty(weight.shape if of_weight else (0,), dtype=wide),
    )


class _Gradients:
    """dhidden and dweight of one call, chunk after chunk; empty where they are not needed."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, ranks: Ranks, of_hidden: bool, of_weight: bool
    ) -> None:
        self.hidden, self.weight, self.ranks = hidden, weight, ranks
        self.of_hidden, self.of_weight = of_hidden, of_weight
        self.dhidden, self.dweight = _empty_gradients(hidden, weight, of_hidden, of_weight)
        self.sums: list[Any] = []
        self.is_first = True

    def add(self, part: slice, dlogits: Tensor) -> None:
        if self.of_hidden:
            torch.mm(dlogits, self.weight, out=self.dhidden[part])
            if self.ranks.size > 1:
                self.sums.append(sum_in_background(self.dhidden[part], self.ranks))
        if self.of_weight:
            _add_product(self.dweight, dlogits, self.hidden[part], 0 if self.is_first else 1)
        self.is_first = False

    def finish(self) -> tuple[Tensor, Tensor]:
        for work in self.sums:
            work.wait()
        if self.is_first:
            self.dweight.zero_()
        return self.dhidden, self.dweight


def _chunks(hidden: Tensor, weight: Tensor, chunk_tokens: int) -> tuple[list[slice], Tensor]:
    """Slices of the tokens, and the buffer for the logits of one."""
    num_tokens, num_cols = hidden.shape[0], weight.shape[0]
    chunk = chunk_tokens or default_chunk_tokens(num_tokens, num_cols)
    chunk = max(min(chunk, num_tokens), 1)
    parts = [slice(at, min(at + chunk, num_tokens)) for at in range(0, num_tokens, chunk)]
    # Every row starts at a multiple of 128 bytes, as the vendor's fastest products want it.
    padded_cols = -(-num_cols // 64) * 64
    return parts, hidden.new_empty(min(chunk, num_tokens), padded_cols)[:, :num_cols]


def forward_in_chunks(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    group_name: str,
    rank: int,
    size: int,
    ignore_index: int | None,
    z_loss: float,
    add_maximum: bool,
    chunk_tokens: int,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss + z and z (tokens,), M and s (2, tokens), and dhidden and dweight of the sum.

    z is empty where there is no z-loss, and a gradient where it is not asked for. dweight is fp32.
    """
    ranks, num_cols = Ranks(group_name, rank, size), weight.shape[0]
    first_col = rank * num_cols
    terms = {"ignore_index": ignore_index, "z_loss": z_loss, "add_maximum": add_maximum}
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss = hidden.new_empty(hidden.shape[0], dtype=wide)
    z = torch.empty_like(loss if z_loss > 0 else loss[:0])
    maximum_and_sum = loss.new_empty(2, hidden.shape[0])
    ones = torch.ones_like(loss) if of_hidden or of_weight else None
    gradients = _Gradients(hidden, weight, ranks, of_hidden, of_weight)
    parts, buffer = _chunks(hidden, weight, chunk_tokens)
    for part in parts:
        labels = target[part]
        logits = torch.mm(hidden[part], weight.t(), out=buffer[: labels.shape[0]])
        ours = statistics(logits, labels, first_col=first_col, ignore_index=ignore_index)
        of_all = all_gather(ours, ranks)
        loss[part], z_part, rows = combine(of_all, labels, shard_cols=num_cols, **terms)
        maximum_and_sum[:, part] = rows
        if z_loss > 0:
            z[part] = z_part
        if ones is not None:
            gradient_(logits, labels, rows, ones[part], first_col=first_col, **terms)
            gradients.add(part, logits)
    return loss, z, maximum_and_sum, *gradients.finish()


def backward_in_chunks(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    maximum_and_sum: Tensor,
    dloss: Tensor,
    group_name: str,
    rank: int,
    size: int,
    ignore_index: int | None,
    z_loss: float,
    add_maximum: bool,
    chunk_tokens: int,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    """dhidden and, in fp32, dweight, with a factor dloss (tokens,) of each token's own."""
    ranks, first_col = Ranks(group_name, rank, size), rank * weight.shape[0]
    terms = {"ignore_index": ignore_index, "z_loss": z_loss, "add_maximum": add_maximum}
    gradients = _Gradients(hidden, weight, ranks, of_hidden, of_weight)
    parts, buffer = _chunks(hidden, weight, chunk_tokens)
    for part in parts:
        labels = target[part]
        logits = torch.mm(hidden[part], weight.t(), out=buffer[: labels.shape[0]])
        rows = maximum_and_sum[:, part].contiguous()
        gradient_(logits, labels, rows, dloss[part], first_col=first_col, **terms)
        gradients.add(part, logits)
    return gradients.finish()


forward = operator("nanotron_fast::linear_cross_entropy_forward")(forward_in_chunks)
backward = operator("nanotron_fast::linear_cross_entropy_backward")(backward_in_chunks)


@forward.register_fake
def _(
    hidden,
    weight,
    target,
    group_name,
    rank,
    size,
    ignore_index,
    z_loss,
    add_maximum,
    chunk_tokens,
    of_hidden,
    of_weight,
):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss = hidden.new_empty(hidden.shape[0], dtype=wide)
    z = torch.empty_like(loss) if z_loss > 0 else loss.new_empty(0)
    maximum_and_sum = loss.new_empty(2, hidden.shape[0])
    return loss, z, maximum_and_sum, *_empty_gradients(hidden, weight, of_hidden, of_weight)


@backward.register_fake
def _(
    hidden,
    weight,
    target,
    maximum_and_sum,
    dloss,
    group_name,
    rank,
    size,
    ignore_index,
    z_loss,
    add_maximum,
    chunk_tokens,
    of_hidden,
    of_weight,
):
    return _empty_gradients(hidden, weight, of_hidden, of_weight)
