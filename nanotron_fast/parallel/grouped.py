"""Products of rows in runs, each run with a matrix of its own: the experts of a mixture.

    y[i] = x[i] W[g]  for the rows i of run g,  W (groups, in, out) as Nanotron merges experts

On a GPU of compute capability 9.0 and later, in bf16, all runs are one launch of torch's grouped
product, which needs nothing from the device. Elsewhere, and where weights' gradients are added to
`main_grad` in fp32, runs are multiplied one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanotron_fast.kernels.runtime.autocast import as_autocast
from nanotron_fast.kernels.runtime.main_grad import main_gradients
from nanotron_fast.kernels.runtime.once import once_differentiable
from nanotron_fast.parallel.products import weight_gradient

# Bytes that rows of a grouped product's operands have to be a multiple of.
_ALIGNMENT_BYTES = 16


class Runs:
    """Where the rows of each group begin and end."""

    def __init__(self, counts: Tensor) -> None:
        """`counts` (groups,): the rows of each group, which may be 0."""
        # Rows up to the end of each group, int32 as torch's grouped product takes them.
        self.ends = counts.cumsum(0).to(torch.int32)

    @cached_property
    def _bounds(self) -> list[int]:
        return [0, *self.ends.tolist()]

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """Each group that has rows, and which. Waits for the device, once."""
        for group, (first, end) in enumerate(itertools.pairwise(self._bounds)):
            if first < end:
                yield group, slice(first, end)


def _is_one_launch(x: Tensor, weight: Tensor) -> bool:
    widths = (x.shape[1], weight.shape[2])
    return (
        x.is_cuda
        and len(x) > 0
        and x.dtype == weight.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x.device) >= (9, 0)
        and all(width * x.element_size() % _ALIGNMENT_BYTES == 0 for width in widths)
    )


def _multiplied(x: Tensor, weight: Tensor, runs: Runs) -> Tensor:
    """x (rows, in) by weight (groups, in, out), or by one that is the transpose of such."""
    if _is_one_launch(x, weight):
        return F.grouped_mm(x, weight, offs=runs.ends)
    out = x.new_empty(len(x), weight.shape[2])
    for group, rows in runs:
        torch.mm(x[rows], weight[group], out=out[rows])
    return out


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, runs: Runs) -> Tensor:
    if _is_one_launch(x, weight):
        return F.grouped_mm(x.t(), dy, offs=runs.ends)
    dw, with_rows = torch.empty_like(weight), set()
    for group, rows in runs:
        torch.mm(x[rows].t(), dy[rows], out=dw[group])
        with_rows.add(group)
    for group in {*range(len(dw))} - with_rows:  # every element is written once
        dw[group].zero_()
    return dw


class _GroupedLinear(torch.autograd.Function):
    """Saves its input and the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, runs: Runs) -> Tensor:
        ctx.save_for_backward(x, weight)
        (ctx.main_grad,) = main_gradients(weight)
        ctx.runs = runs
        return _multiplied(x, weight, runs)

    @staticmethod
    @once_differentiable("grouped_linear")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dy = dy.contiguous()
        dx = _multiplied(dy, weight.transpose(1, 2), ctx.runs) if needs_x else None
        dw = None
        if needs_weight and ctx.main_grad is None:
            dw = _weight_gradient(dy, x, weight, ctx.runs)
        elif needs_weight:
            for group, rows in ctx.runs:
                weight_gradient(x[rows], dy[rows], ctx.main_grad[group])
        return dx, dw, None


def grouped_linear(x: Tensor, weight: Tensor, runs: Runs) -> Tensor:
    """Multiplies each run of rows by the matrix of its group: (rows, out).

    Args:
        x: (rows, in), the rows of each group beside each other, in the order of the groups.
        weight: (groups, in, out). If it has a `main_grad` (fp32, its shape), the gradient is added
            to that and `grad` stays None.
        runs: of all rows.

    Raises ValueError where shapes do not fit.
    """
    if x.dim() != 2 or weight.dim() != 3 or weight.shape[:2] != (len(runs.ends), x.shape[1]):
        raise ValueError(
            f"grouped_linear: x {tuple(x.shape)}, weight {tuple(weight.shape)} and "
            f"{len(runs.ends)} groups: they should be (rows, in), (groups, in, out)"
        )
    low, weight = as_autocast(x.contiguous(), weight)
    out: Tensor = _GroupedLinear.apply(low, weight, runs)
    return out
