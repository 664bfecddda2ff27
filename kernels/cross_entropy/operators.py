"""The three steps of the vocabulary-parallel cross entropy as operators.

    statistics   logits of a rank -> largest logit, sum of exp(l - largest), the target's logit
    combine      those of all ranks -> loss, z, and M and s of the whole row
    gradient     logits, M, s and the gradient of the loss -> the gradient, or over the logits

The formulas are in `cross_entropy`, the shapes in `kernels`. Each step is a kernel, and the same in
plain torch for CPU tensors and fp64, which works through a temporary copy of the logits in fp32 (or
fp64).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nanotron_fast.kernels.cross_entropy.kernels import (
    combine_kernel,
    gradient_kernel,
    statistics_kernel,
)
from nanotron_fast.kernels.runtime.backend import uses_triton
from nanotron_fast.kernels.runtime.launch import Prepared
from nanotron_fast.kernels.runtime.operators import operator
from nanotron_fast.kernels.runtime.rows import empty_rows
from nanotron_fast.kernels.runtime.sizes import ceil_div, next_power_of_2
from nanotron_fast.kernels.runtime.tuning import Tuned, powers_of_2, remembered


class _Terms(NamedTuple):
    """What the gradient depends on beside tensors; the names are those of the operators."""

    first_col: int
    ignore_index: int | None
    z_loss: float
    add_maximum: bool


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _launches(logits: Tensor) -> bool:
    return uses_triton(logits) and logits.dtype != torch.float64


def _vector_of(num_cols: int, stride: int, itemsize: int) -> tuple[int, bool]:
    """Elements of 16 bytes, and whether some rows do not begin and end at multiples of that."""
    vector = 16 // itemsize
    return vector, (num_cols | stride) % vector != 0


def _where_local(target: Tensor, num_cols: int, first_col: int) -> tuple[Tensor, Tensor]:
    """Columns of the targets in this shard, 0 for others, and whether they are there."""
    col = target.long() - first_col
    here = (col >= 0) & (col < num_cols)
    return torch.where(here, col, 0), here


def _statistics_torch(
    logits: Tensor, target: Tensor, first_col: int, ignore_index: int | None
) -> Tensor:
    values = logits.to(_wide_dtype(logits.dtype))
    maximum = values.amax(-1)
    shift = torch.where(maximum == float("-inf"), 0.0, maximum)
    total = (values - shift.unsqueeze(-1)).exp_().sum(-1)
    col, here = _where_local(target, logits.shape[-1], first_col)
    picked = torch.where(here, values.gather(-1, col.unsqueeze(-1)).squeeze(-1), 0.0)
    if ignore_index is not None:
        is_ignored = target == ignore_index
        maximum, picked = (torch.where(is_ignored, 0.0, t) for t in (maximum, picked))
        total = torch.where(is_ignored, 1.0, total)
    return torch.stack((maximum, total, picked))


def _combine_torch(
    statistics: Tensor,
    target: Tensor,
    shard_cols: int,
    ignore_index: int | None,
    z_loss: float,
    add_maximum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    maxima, sums, picked = statistics.unbind(1)
    maximum = maxima.amax(0)
    total = (sums * (maxima - maximum).exp()).sum(0)
    owner, inside = _where_local(target.div(shard_cols, rounding_mode="floor"), len(maxima), 0)
    if ignore_index is not None:
        is_ignored = target == ignore_index
        inside = inside & ~is_ignored
        total = torch.where(is_ignored, 1.0, total)
    picked = picked.gather(0, owner.unsqueeze(0)).squeeze(0)
    log_sum = total.log()
    loss = log_sum - torch.where(inside, picked - maximum, 0.0)
    z = torch.empty_like(loss[:0])
    if z_loss > 0:
        z = z_loss * (log_sum + maximum if add_maximum else log_sum).square()
        loss = loss + z
    return loss, z, torch.stack((maximum, total))


def _gradient_torch(
    logits: Tensor,
    target: Tensor,
    maximum_and_sum: Tensor,
    dloss: Tensor,
    terms: _Terms,
    gradient: Tensor,
) -> None:
    maximum, total = maximum_and_sum
    scale = dloss / total
    if terms.z_loss > 0:
        log_z = total.log() + maximum if terms.add_maximum else total.log()
        scale = scale * (1 + 2 * terms.z_loss * log_z)
    # Where the dtypes allow it, values are computed in the result itself, with no copy to and fro.
    is_wide = gradient.dtype == maximum.dtype
    out = gradient if is_wide else torch.empty_like(logits, dtype=maximum.dtype)
    values = torch.sub(logits, maximum.unsqueeze(-1), out=out).exp_()
    values.mul_(scale.unsqueeze(-1))
    col, here = _where_local(target, logits.shape[-1], terms.first_col)
    values.scatter_add_(-1, col.unsqueeze(-1), torch.where(here, -dloss, 0.0).unsqueeze(-1))
    if terms.ignore_index is not None:
        values.masked_fill_((target == terms.ignore_index).unsqueeze(-1), 0.0)
    if not is_wide:
        gradient.copy_(values)


@dataclass(frozen=True)
class _StatisticsBlocks(Tuned, operation="cross_entropy_statistics", per_thread=powers_of_2(1, 64)):
    """A program takes `per_thread` logits of a row a thread at a time."""

    per_thread: int
    num_warps: int

    @classmethod
    def rule(cls, cols: int, itemsize: int) -> _StatisticsBlocks:
        # Two loads of 16 bytes of bf16, or four of fp32, on their way at once.
        return cls(16, 8 if cols > 2048 else 4)

    def candidates(self) -> list[_StatisticsBlocks]:
        return [_StatisticsBlocks(*each) for each in ((16, 4), (16, 16), (32, 4), (32, 8))]


@remembered
def _prepared_statistics(
    shape: torch.Size, stride: int, itemsize: int, first_col: int, ignore_index: int | None
) -> Prepared:
    num_rows, num_cols = shape
    vector, has_edges = _vector_of(num_cols, stride, itemsize)
    blocks = _StatisticsBlocks.chosen(cols=next_power_of_2(num_cols), itemsize=itemsize)
    return Prepared(
        (num_rows,),
        (stride, num_rows, num_cols, first_col, ignore_index or 0),
        HAS_IGNORE=ignore_index is not None,
        HAS_EDGES=has_edges,
        LANES=blocks.num_warps * 32 * blocks.per_thread // vector,
        VECTOR=vector,
        num_warps=blocks.num_warps,
    )


@operator("nanotron_fast::cross_entropy_statistics")
def statistics(logits: Tensor, target: Tensor, first_col: int, ignore_index: int | None) -> Tensor:
    """(3, rows), fp32: largest logit of this shard, sum over it, the target's logit or 0."""
    if not _launches(logits):
        return _statistics_torch(logits, target, first_col, ignore_index)
    result = logits.new_empty((3, logits.shape[0]), dtype=torch.float32)
    prepared = _prepared_statistics(
        logits.shape, logits.stride(0), logits.element_size(), first_col, ignore_index
    )
    prepared.launch(statistics_kernel, logits, target, result)
    return result


@statistics.register_fake
def _(logits, target, first_col, ignore_index):
    return logits.new_empty(3, logits.shape[0], dtype=_wide_dtype(logits.dtype))


# A few bytes of each row: nothing is gained by tuning it.
@remembered
def _prepared_combine(
    shape: torch.Size,
    shard_cols: int,
    ignore_index: int | None,
    z_loss: float,
    add_maximum: bool,
) -> Prepared:
    num_ranks, _, num_rows = shape
    return Prepared(
        (ceil_div(num_rows, 128),),
        (num_rows, num_ranks, shard_cols, ignore_index or 0, z_loss),
        HAS_IGNORE=ignore_index is not None,
        HAS_Z=z_loss > 0,
        ADD_MAXIMUM=add_maximum,
        BLOCK=128,
        num_warps=4,
    )


@operator("nanotron_fast::cross_entropy_combine")
def combine(
    of_all: Tensor,
    target: Tensor,
    shard_cols: int,
    ignore_index: int | None,
    z_loss: float,
    add_maximum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss + z and z, both (rows,), and M and s (2, rows). z is empty without a z-loss."""
    if not _launches(of_all):
        return _combine_torch(of_all, target, shard_cols, ignore_index, z_loss, add_maximum)
    shape = of_all.shape
    num_rows = shape[2]
    loss, z = of_all.new_empty(num_rows), of_all.new_empty(num_rows if z_loss > 0 else 0)
    maximum_and_sum = of_all.new_empty((2, num_rows))
    prepared = _prepared_combine(shape, shard_cols, ignore_index, z_loss, add_maximum)
    prepared.launch(combine_kernel, of_all, target, loss, z, maximum_and_sum)
    return loss, z, maximum_and_sum


@combine.register_fake
def _(of_all, target, shard_cols, ignore_index, z_loss, add_maximum):
    loss = of_all.new_empty(of_all.shape[2])
    z = torch.empty_like(loss) if z_loss > 0 else of_all.new_empty(0)
    return loss, z, of_all.new_empty(2, of_all.shape[2])


@dataclass(frozen=True)
class _GradientBlocks(Tuned, operation="cross_entropy_gradient"):
    """A program takes `block` logits of a row."""

    block: int
    num_warps: int

    @classmethod
    def rule(cls, cols: int, itemsize: int) -> _GradientBlocks:
        return cls(8192, 8) if cols > 4096 else cls(2048, 4)

    def candidates(self) -> list[_GradientBlocks]:
        return [_GradientBlocks(*each) for each in ((2048, 4), (4096, 4), (4096, 8), (8192, 16))]


@remembered
def _prepared_gradient(
    shape: torch.Size, strides: tuple[int, int], itemsize: int, terms: _Terms
) -> Prepared:
    num_rows, num_cols = shape
    blocks = _GradientBlocks.chosen(cols=next_power_of_2(num_cols), itemsize=itemsize)
    num_blocks = ceil_div(num_cols, blocks.block)
    vector, has_edges = _vector_of(num_cols, strides[0], itemsize)
    return Prepared(
        (num_rows * num_blocks,),
        (
            *(*strides, num_rows, num_cols, num_blocks, terms.first_col),
            *(terms.ignore_index or 0, terms.z_loss),
        ),
        HAS_IGNORE=terms.ignore_index is not None,
        HAS_Z=terms.z_loss > 0,
        ADD_MAXIMUM=terms.add_maximum,
        HAS_EDGES=has_edges,
        STRIDES_AGREE=strides[0] == strides[1],
        VECTOR=vector,
        BLOCK=blocks.block,
        num_warps=blocks.num_warps,
    )


def _write_gradient(
    logits: Tensor,
    target: Tensor,
    maximum_and_sum: Tensor,
    dloss: Tensor,
    terms: _Terms,
    gradient: Tensor,
) -> None:
    if not _launches(logits):
        _gradient_torch(logits, target, maximum_and_sum, dloss, terms, gradient)
        return
    strides = (logits.stride(0), gradient.stride(0))
    prepared = _prepared_gradient(logits.shape, strides, logits.element_size(), terms)
    prepared.launch(gradient_kernel, logits, target, maximum_and_sum, dloss, gradient)


@operator("nanotron_fast::cross_entropy_gradient")
def gradient(
    logits: Tensor,
    target: Tensor,
    maximum_and_sum: Tensor,
    dloss: Tensor,
    first_col: int,
    ignore_index: int | None,
    z_loss: float,
    add_maximum: bool,
) -> Tensor:
    """The gradient of the logits, in their dtype. dloss is (rows,), fp32."""
    result = empty_rows(logits)
    terms = _Terms(first_col, ignore_index, z_loss, add_maximum)
    _write_gradient(logits, target, maximum_and_sum, dloss, terms, gradient=result)
    return result


@gradient.register_fake
def _(logits, target, maximum_and_sum, dloss, first_col, ignore_index, z_loss, add_maximum):
    return logits.new_empty(logits.shape)


@operator("nanotron_fast::cross_entropy_gradient_", mutates_args=("logits",))
def gradient_(
    logits: Tensor,
    target: Tensor,
    maximum_and_sum: Tensor,
    dloss: Tensor,
    first_col: int,
    ignore_index: int | None,
    z_loss: float,
    add_maximum: bool,
) -> None:
    """The same, written over the logits."""
    terms = _Terms(first_col, ignore_index, z_loss, add_maximum)
    _write_gradient(logits, target, maximum_and_sum, dloss, terms, gradient=logits)
