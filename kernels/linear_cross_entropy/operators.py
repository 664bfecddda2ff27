"""Linear layer and cross entropy chunk by chunk, as operators: `linear_cross_entropy` says why.

Everything runs in one call of an operator, so that one buffer of logits serves all chunks in eager
mode and under torch.compile alike. `whole` has the way where one chunk is all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanotron_fast.kernels.cross_entropy.operators import combine, gradient_, statistics
from nanotron_fast.kernels.runtime.backend import uses_triton
from nanotron_fast.kernels.runtime.collectives import Ranks, all_gather, sum_in_background
from nanotron_fast.kernels.runtime.operators import operator
from nanotron_fast.kernels.runtime.sizes import ceil_div, next_power_of_2
from nanotron_fast.kernels.runtime.tuning import Tuned, powers_of_2

# How many logits exist at a time by default, at most: 1 GiB of bf16.
_CHUNK_LOGITS = 2**29


@dataclass(frozen=True)
class _Chunk(Tuned, operation="linear_cross_entropy", logits=powers_of_2(1024, 2**40)):
    """How many logits to a chunk, where there are several: never more than memory is counted on."""

    logits: int

    @classmethod
    def rule(cls, cols: int, itemsize: int) -> _Chunk:
        return cls(_CHUNK_LOGITS)

    def candidates(self) -> list[_Chunk]:
        return [_Chunk(self.logits // 2), _Chunk(self.logits // 4)]


class Settings(NamedTuple):
    """What both operators are given beside tensors. `chunk_tokens` is 0 where they choose."""

    ranks: Ranks
    ignore_index: int | None
    z_loss: float
    add_maximum: bool
    chunk_tokens: int

    @property
    def terms(self) -> dict[str, Any]:
        """The arguments of the loss's own operators."""
        return {
            "ignore_index": self.ignore_index,
            "z_loss": self.z_loss,
            "add_maximum": self.add_maximum,
        }

    def named(self) -> dict[str, Any]:
        """The operators' arguments of these names."""
        return {
            "group_name": self.ranks.name,
            "rank": self.ranks.rank,
            "size": self.ranks.size,
            **self.terms,
            "chunk_tokens": self.chunk_tokens,
        }


def default_chunk_tokens(num_tokens: int, num_cols: int, logits: int = _CHUNK_LOGITS) -> int:
    """All tokens where their logits fit the buffer, or as many as fill it, split evenly."""
    most = max(logits // num_cols, 128)
    if num_tokens <= most:
        return num_tokens
    chunk = ceil_div(num_tokens, ceil_div(num_tokens, most))
    # Whole tiles of a matrix product, where that costs little.
    return chunk if chunk < 1024 else ceil_div(chunk, 128) * 128


def is_one_chunk(num_tokens: int, num_cols: int, chunk_tokens: int, spared_tokens: int = 0) -> bool:
    """Whether the logits of all tokens, of which there are some, exist at a time.

    `spared_tokens` do not count where the default decides.
    """
    if chunk_tokens or num_tokens == 0:
        return 0 < num_tokens <= chunk_tokens
    counted = max(num_tokens - spared_tokens, 0)
    return counted <= default_chunk_tokens(counted, num_cols)


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


class Gradients:
    """dhidden and dweight of one call, chunk after chunk.

    Args:
        hidden, weight: of one dtype.
        ranks: over whom dhidden is summed.
        dhidden: what it is written to, in hidden's dtype; None where it is not needed.
        dweight: what it is written or added to, in hidden's dtype or a wider one, or None.
        is_added: whether the first chunk is added to what is in dweight.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        ranks: Ranks,
        dhidden: Tensor | None,
        dweight: Tensor | None,
        *,
        is_added: bool = False,
    ) -> None:
        self.hidden, self.weight, self.ranks = hidden, weight, ranks
        self.dhidden, self.dweight, self.is_added = dhidden, dweight, is_added
        self.sums: list[Any] = []

    def add(self, part: slice, dlogits: Tensor) -> None:
        if self.dhidden is not None:
            torch.mm(dlogits, self.weight, out=self.dhidden[part])
            if self.ranks.size > 1:
                self.sums.append(sum_in_background(self.dhidden[part], self.ranks))
        if self.dweight is not None:
            _add_product(self.dweight, dlogits, self.hidden[part], int(self.is_added))
        self.is_added = True

    def finish(self) -> None:
        for work in self.sums:
            work.wait()
        if self.dweight is not None and not self.is_added:
            self.dweight.zero_()


def logits_buffer(hidden: Tensor, num_rows: int, num_cols: int) -> Tensor:
    """(rows, cols) whose rows start at multiples of 128 bytes, as fast products want them."""
    return hidden.new_empty(num_rows, ceil_div(num_cols, 64) * 64)[:, :num_cols]


def _chunks(hidden: Tensor, weight: Tensor, chunk_tokens: int) -> tuple[list[slice], Tensor]:
    """Slices of the tokens, and the buffer for the logits of one."""
    num_tokens, num_cols = hidden.shape[0], weight.shape[0]
    logits = _CHUNK_LOGITS
    if uses_triton(hidden):  # what was measured is of a GPU
        tuned = _Chunk.chosen(cols=next_power_of_2(num_cols), itemsize=hidden.element_size())
        logits = min(tuned.logits, _CHUNK_LOGITS)
    chunk = chunk_tokens or default_chunk_tokens(num_tokens, num_cols, logits)
    chunk = max(min(chunk, num_tokens), 1)
    parts = [slice(at, min(at + chunk, num_tokens)) for at in range(0, num_tokens, chunk)]
    return parts, logits_buffer(hidden, min(chunk, num_tokens), num_cols)


def losses_of(
    logits: Tensor, target: Tensor, ranks: Ranks, terms: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """loss + z and z (rows,), and M and s (2, rows), from this rank's logits (rows, cols)."""
    num_cols = logits.shape[1]
    ours = statistics(
        logits, target, first_col=ranks.rank * num_cols, ignore_index=terms["ignore_index"]
    )
    found: tuple[Tensor, Tensor, Tensor] = combine(
        all_gather(ours, ranks), target, shard_cols=num_cols, **terms
    )
    return found


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
    ranks, first_col = Ranks(group_name, rank, size), rank * weight.shape[0]
    terms = {"ignore_index": ignore_index, "z_loss": z_loss, "add_maximum": add_maximum}
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss = hidden.new_empty(hidden.shape[0], dtype=wide)
    z = torch.empty_like(loss if z_loss > 0 else loss[:0])
    maximum_and_sum = loss.new_empty(2, hidden.shape[0])
    ones = torch.ones_like(loss) if of_hidden or of_weight else None
    dhidden, dweight = _empty_gradients(hidden, weight, of_hidden, of_weight)
    gradients = Gradients(
        hidden, weight, ranks, dhidden if of_hidden else None, dweight if of_weight else None
    )
    parts, buffer = _chunks(hidden, weight, chunk_tokens)
    for part in parts:
        labels = target[part]
        logits = torch.mm(hidden[part], weight.t(), out=buffer[: labels.shape[0]])
        loss[part], z_part, rows = losses_of(logits, labels, ranks, terms)
        maximum_and_sum[:, part] = rows
        if z_loss > 0:
            z[part] = z_part
        if ones is not None:
            gradient_(logits, labels, rows, ones[part], first_col=first_col, **terms)
            gradients.add(part, logits)
    gradients.finish()
    return loss, z, maximum_and_sum, dhidden, dweight


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
    ranks = Ranks(group_name, rank, size)
    settings = Settings(ranks, ignore_index, z_loss, add_maximum, chunk_tokens)
    dhidden, dweight = _empty_gradients(hidden, weight, of_hidden, of_weight)
    gradients = Gradients(
        hidden, weight, ranks, dhidden if of_hidden else None, dweight if of_weight else None
    )
    add_in_chunks(gradients, target, maximum_and_sum, dloss, settings)
    return dhidden, dweight


def add_in_chunks(
    gradients: Gradients,
    target: Tensor,
    maximum_and_sum: Tensor,
    dloss: Tensor,
    settings: Settings,
) -> None:
    """The same, to where `gradients` says; no operator, for that may be a main gradient."""
    hidden, weight = gradients.hidden, gradients.weight
    first_col = settings.ranks.rank * weight.shape[0]
    parts, buffer = _chunks(hidden, weight, settings.chunk_tokens)
    for part in parts:
        labels = target[part]
        logits = torch.mm(hidden[part], weight.t(), out=buffer[: labels.shape[0]])
        rows = maximum_and_sum[:, part].contiguous()
        gradient_(logits, labels, rows, dloss[part], first_col=first_col, **settings.terms)
        gradients.add(part, logits)
    gradients.finish()


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
