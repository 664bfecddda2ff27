"""Embedding whose vocabulary is split between the ranks of a group.

    rank r holds rows r * rows and on:  y[t] = weight[ids[t] - r * rows], 0 where that is not here
    output = sum of y over the ranks:   an all-reduce, or a reduce-scatter along dim 0
    dweight[v] = sum of dy[t] over the tokens t with ids[t] = v

No mask is made or saved: the gather reads nothing for an id of another rank, and backward sorts the
ids, those of other ranks last. Then one program sums the rows of dy of one id, in fp32 and in the
tokens' order, so dweight is rounded once and is the same in every run, which atomic adds would not
give. Of an id that stands very often (padding), pieces of the sorted ids are summed side by side
and then added up, in order as well.

Bytes for (tokens, hidden) of two-byte elements: forward 4 an element, beside the collective;
backward 2 an element of dy, and 2 an element of the dense dweight. Saved for backward: the ids.
Shapes: ids (...), output and dy (..., hidden), or (dim 0 / ranks, ..., hidden) where scattered;
weight, dweight (rows, hidden) with rows = vocab/ranks.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from nanotron_fast.kernels.embedding.kernels import gather_kernel, join_kernel, sum_kernel
from nanotron_fast.kernels.runtime.backend import on_grid, operator, uses_triton
from nanotron_fast.kernels.runtime.collectives import (
    Group,
    Ranks,
    all_gather,
    all_reduce,
    reduce_scatter,
    resolve,
)

MODES = ("all_reduce", "reduce_scatter")
# Sorted tokens that one program sums at most.
_PIECE = 256


def vocab_parallel_embedding_reference(
    ids: Tensor, weight: Tensor, *, padding_idx: int | None = None
) -> Tensor:
    """The same for a whole vocabulary on one rank, in plain torch."""
    return torch.nn.functional.embedding(ids.long(), weight, padding_idx)


def _local_rows(ids: Tensor, num_rows: int, first_row: int, padding_idx: int | None) -> Tensor:
    """Rows of this rank (tokens,) int32; num_rows where an id is another rank's, or padding."""
    rows = ids.long() - first_row
    is_here = (rows >= 0) & (rows < num_rows)
    if padding_idx is not None:
        is_here &= ids != padding_idx
    return torch.where(is_here, rows, num_rows).int()


def _check_ids(ids: Tensor, vocab: int) -> None:
    if ids.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= vocab:
        wrong = low if low < 0 else high
        raise IndexError(f"vocab_parallel_embedding: id {wrong} for a vocabulary of {vocab}")


@operator("nanotron_fast::embedding_gather")
def gather(ids: Tensor, weight: Tensor, first_row: int, vocab: int) -> Tensor:
    """(tokens,) -> (tokens, hidden), this rank's part of the sum over all ranks."""
    num_tokens, (num_rows, num_cols) = ids.shape[0], weight.shape
    if ids.device.type == "cpu":
        _check_ids(ids, vocab)
    if not uses_triton(weight):
        rows = _local_rows(ids, num_rows, first_row, None)
        is_here = rows < num_rows
        values = weight[torch.where(is_here, rows, 0)]
        return values.masked_fill_(~is_here.unsqueeze(1), 0)
    out = weight.new_empty(num_tokens, num_cols)
    if out.numel():
        cols = min(triton.next_power_of_2(num_cols), 4096)
        tokens = max(4096 // cols, 1)
        num_col_blocks = triton.cdiv(num_cols, cols)
        on_grid(gather_kernel, (triton.cdiv(num_tokens, tokens) * num_col_blocks,))(
            ids,
            weight,
            out,
            num_tokens,
            num_cols,
            num_rows,
            first_row,
            num_col_blocks,
            TOKENS=tokens,
            COLS=cols,
            num_warps=4,
        )
    return out


@gather.register_fake
def _(ids, weight, first_row, vocab):
    return weight.new_empty(ids.shape[0], weight.shape[1])


@operator("nanotron_fast::embedding_sum")
def sum_by_id(
    dy: Tensor, ids: Tensor, num_rows: int, first_row: int, padding_idx: int | None
) -> Tensor:
    """dy (tokens, hidden), contiguous -> dweight (rows, hidden) in dy's dtype."""
    num_tokens, num_cols = dy.shape
    rows = _local_rows(ids, num_rows, first_row, padding_idx)
    if not uses_triton(dy) or dy.dtype == torch.float64:
        wide = torch.promote_types(dy.dtype, torch.float32)
        total = dy.new_zeros(num_rows + 1, num_cols, dtype=wide)
        return total.index_add_(0, rows, dy.to(wide))[:num_rows].to(dy.dtype, copy=True)
    dweight = dy.new_zeros(num_rows, num_cols)
    if dy.numel() == 0:
        return dweight
    rows, order = torch.sort(rows, stable=True)
    num_pieces = triton.cdiv(num_tokens, _PIECE)
    partial = torch.empty(2 * num_pieces, num_cols, dtype=torch.float32, device=dy.device)
    cols = min(triton.next_power_of_2(num_cols), 1024)
    num_col_blocks = triton.cdiv(num_cols, cols)
    sizes = (num_tokens, num_cols, num_rows, num_col_blocks)
    blocks = {"PIECE": _PIECE, "COLS": cols, "num_warps": 4}
    on_grid(sum_kernel, (num_tokens * num_col_blocks,))(
        rows, order, dy, dweight, partial, *sizes, TOKENS=8, **blocks
    )
    if num_pieces > 1:
        on_grid(join_kernel, (num_pieces * num_col_blocks,))(
            rows, partial, dweight, *sizes, **blocks
        )
    return dweight


@sum_by_id.register_fake
def _(dy, ids, num_rows, first_row, padding_idx):
    return dy.new_empty(num_rows, dy.shape[1])


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, group_name, rank, size, is_scattered, padding_idx):
        ranks = Ranks(group_name, rank, size)
        num_rows, hidden = weight.shape
        ctx.save_for_backward(ids)
        ctx.ranks, ctx.is_scattered, ctx.padding_idx = ranks, is_scattered, padding_idx
        ctx.num_rows = num_rows
        out = gather(ids.reshape(-1), weight, rank * num_rows, size * num_rows)
        out = out.view(*ids.shape, hidden)
        return reduce_scatter(out, ranks) if is_scattered else all_reduce(out, ranks)

    @staticmethod
    def backward(ctx, dy):
        (ids,) = ctx.saved_tensors
        if ctx.is_scattered:
            dy = all_gather(dy, ctx.ranks)
        dy = dy.reshape(ids.numel(), dy.shape[-1]).contiguous()
        first_row = ctx.ranks.rank * ctx.num_rows
        dweight = sum_by_id(dy, ids.reshape(-1), ctx.num_rows, first_row, ctx.padding_idx)
        return None, dweight, None, None, None, None, None


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
        weight: (vocab/ranks, hidden): rank r holds row r * vocab/ranks and on.
        group: a process group, a DeviceMesh of one dimension, or None for a rank alone.
        mode: "all_reduce": every rank has the whole result, and passes in the whole gradient.
            "reduce_scatter": each has its share of dim 0 (sequence parallelism), and backward
            gathers the gradient.
        padding_idx: an id whose row has no gradient, as in torch.nn.Embedding. It counts in the
            whole vocabulary; in Nanotron in the rows of each rank.

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
    is_scattered = mode == "reduce_scatter"
    if is_scattered and (ids.dim() == 0 or ids.shape[0] % ranks.size):
        raise ValueError(
            f"{name}: ids {tuple(ids.shape)} do not split along dim 0 over {ranks.size} ranks"
        )
    return _Embedding.apply(ids, weight.contiguous(), *ranks, is_scattered, padding_idx)
