"""Embedding whose vocabulary is split between the ranks of a group.

    rank r holds rows r * rows and on:  y[t] = weight[ids[t] - r * rows], 0 where that is not here
    output = sum of y over the ranks:   an all-reduce, or a reduce-scatter along dim 0
    dweight[v] = sum of dy[t] over the tokens t with ids[t] = v

No mask is made or saved: the gather reads nothing for an id of another rank, and backward sorts the
ids, those of other ranks last. Then one program sums the rows of dy of one id, in fp32 and in the
tokens' order, so dweight is rounded once and is the same in every run, which atomic adds would not
give. Where an id stands very often (padding), pieces of its tokens are summed side by side, and
their sums are added up, in order as well.

Bytes for (tokens, hidden) of two-byte elements: forward 4 an element, beside the collective;
backward 2 an element of dy, and 8 an element of those rows of a `main_grad` that ids name, the
others being left alone. Without a `main_grad` the gradient is dense, for the norm, the optimizer
and sums over ranks read all of a parameter's `grad`: 2 an element of dweight to clear it, and 2 of
the rows that ids name. To clear the other rows alone would save no more than 2 an element of dy (an
eighth at 16384 tokens of 128256 rows), and finding them takes more launches than that is worth.
Saved for backward: the ids.
Shapes: ids (...), output and dy (..., hidden), or (dim 0 / ranks, ..., hidden) where scattered;
weight, dweight (rows, hidden) with rows = vocab/ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanotron_fast.kernels.embedding.operators import add_by_id, gather, sum_by_id
from nanotron_fast.kernels.embedding.reference import vocab_parallel_embedding_reference
from nanotron_fast.kernels.runtime.collectives import (
    Group,
    all_gather,
    all_reduce,
    reduce_scatter,
    resolve,
)
from nanotron_fast.kernels.runtime.main_grad import eager_main_grad
from nanotron_fast.kernels.runtime.once import once_differentiable
from nanotron_fast.kernels.runtime.rows import as_row_of_ids

__all__ = ["MODES", "vocab_parallel_embedding", "vocab_parallel_embedding_reference"]

MODES = ("all_reduce", "reduce_scatter")


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, ranks, is_scattered, padding_idx):
        num_rows, hidden = weight.shape
        ctx.save_for_backward(ids)
        ctx.ranks, ctx.is_scattered, ctx.padding_idx = ranks, is_scattered, padding_idx
        # Asked of the weight itself: a contiguous copy has none.
        ctx.num_rows, ctx.main_grad = num_rows, eager_main_grad(weight)
        first_row, vocab = ranks.rank * num_rows, ranks.size * num_rows
        out = gather(as_row_of_ids(ids), weight.contiguous(), first_row, vocab)
        if ids.ndim != 1:
            out = out.view(*ids.shape, hidden)
        return reduce_scatter(out, ranks) if is_scattered else all_reduce(out, ranks)

    @staticmethod
    @once_differentiable("vocab_parallel_embedding")
    def backward(ctx, dy):
        (ids,) = ctx.saved_tensors
        if ctx.is_scattered:
            dy = all_gather(dy, ctx.ranks)
        dy = dy.reshape(ids.numel(), dy.shape[-1]).contiguous()
        ids, main_grad, dweight = as_row_of_ids(ids), ctx.main_grad, None
        options = {"first_row": ctx.ranks.rank * ctx.num_rows, "padding_idx": ctx.padding_idx}
        if main_grad is None:
            dweight = sum_by_id(dy, ids, num_rows=ctx.num_rows, **options)
        else:
            add_by_id(main_grad, dy, ids, **options)
        return None, dweight, None, None, None


def vocab_parallel_embedding(
    ids: Tensor,
    weight: Tensor,
    group: Group = None,
    *,
    mode: str = "all_reduce",
    padding_idx: int | None = None,
) -> Tensor:
    """The rows of the whole weight that the ids name, where every rank holds some of the rows.

    An id outside the vocabulary raises IndexError on the CPU. On a device that would take a
    synchronisation: there its embedding is 0, and it has no gradient.

    Args:
        ids: (...) of any integer dtype, the same on every rank.
        weight: (vocab/ranks, hidden): rank r holds row r * vocab/ranks and on. If it has a
            `main_grad` (fp32, its shape), the gradients of the rows that ids name are added to
            that, and `grad` stays None.
        group: a process group, a DeviceMesh of one dimension, or None for a rank alone.
        mode: "all_reduce": every rank has the whole result, and passes in the whole gradient.
            "reduce_scatter": each has its share of dim 0 (sequence parallelism), and backward
            gathers the gradient.
        padding_idx: an id whose row has no gradient, as in torch.nn.Embedding, from 0 on. It counts
            in the whole vocabulary; in Nanotron in the rows of each rank.

    Returns:
        (..., hidden) in the weight's dtype, with dim 0 divided by the ranks if it is scattered.

    Raises:
        ValueError: shapes, dtypes or options do not fit.
        IndexError: an id is outside the vocabulary; on the CPU alone.
    """
    name = "vocab_parallel_embedding"
    if mode not in MODES:
        raise ValueError(f"{name}: mode={mode!r}: choose {', '.join(MODES)}")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"{name}: weight {tuple(weight.shape)} {weight.dtype}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name}: ids are {ids.dtype}, not whole numbers")
    ranks = resolve(group)
    vocab = ranks.size * weight.shape[0]
    if padding_idx is not None and not 0 <= padding_idx < vocab:
        raise ValueError(f"{name}: padding_idx={padding_idx} for a vocabulary of {vocab}")
    is_scattered = mode == "reduce_scatter"
    if is_scattered and (ids.dim() == 0 or ids.shape[0] % ranks.size):
        raise ValueError(
            f"{name}: ids {tuple(ids.shape)} do not split along dim 0 over {ranks.size} ranks"
        )
    return _Embedding.apply(ids, weight, ranks, is_scattered, padding_idx)
