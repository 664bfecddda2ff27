"""Linear layers whose weights are split over a tensor-parallel group, with Nanotron's semantics.

A column linear splits the output features, a row linear the input features. In mode "all_reduce"
activations are whole on every rank: a column linear sums the input's gradient over ranks, a row
linear its output. In mode "reduce_scatter" (sequence parallelism) what lies between is split along
dimension 0: a column linear gathers its input, a row linear scatters its output.

Shapes, with size the number of ranks: a column linear takes (n, ..., in), with sequence parallelism
(n / size, ..., in), and gives (n, ..., out / size); a row linear takes (n, ..., in / size) and
gives (n, ..., out), or (n / size, ..., out). Weights are (out / size, in) and (out, in / size).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanotron_fast.errors import TopologyError
from nanotron_fast.kernels.runtime.autocast import as_autocast
from nanotron_fast.kernels.runtime.collectives import Group, Ranks, resolve
from nanotron_fast.kernels.runtime.main_grad import main_gradients
from nanotron_fast.kernels.runtime.once import once_differentiable
from nanotron_fast.parallel.chunks import AS_THEY_ARE
from nanotron_fast.parallel.communication import check_mode, start_all_gather
from nanotron_fast.parallel.products import (
    bias_gradient,
    gather_linear,
    input_gradient,
    linear_all_reduce,
    linear_scatter,
    row_gradients,
    weight_gradient,
)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -2)


def _check(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError where shapes do not fit; one number as a bias would be added to all."""
    if x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{name}: x {tuple(x.shape)} for weight {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias {tuple(bias.shape)} for weight {tuple(weight.shape)}")


def _is_torchs(ctx: Any) -> bool:
    """Whether torch differentiates a backward: that of one rank, and into no main_grad."""
    return ctx.ranks.size == 1 and all(each is None for each in ctx.main_grads)


class _ColumnLinear(torch.autograd.Function):
    """On (rows, in). Saves its input (the shard, or what was gathered) and the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ranks: Ranks,
        mode: str,
        recompute_allgather: bool,
    ) -> Tensor:
        ctx.regathers = mode == "reduce_scatter" and recompute_allgather
        ctx.order = AS_THEY_ARE
        kept: Tensor | None = x
        if mode == "reduce_scatter":
            y, gathered, order = gather_linear(
                x, weight, bias, ranks, keeps_gathered=not recompute_allgather
            )
            if not recompute_allgather:
                kept, ctx.order = gathered, order
        else:
            y = torch.nn.functional.linear(x, weight, bias)
        ctx.save_for_backward(kept, weight)
        ctx.main_grads = main_gradients(weight, bias)
        ctx.ranks, ctx.mode = ranks, mode
        return y

    @staticmethod
    @once_differentiable("column_linear", unless=_is_torchs)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dy = dy.contiguous()
        # x travels behind the product for dx, and dx behind that for dw.
        gathering = start_all_gather(x, ctx.ranks) if ctx.regathers and needs_weight else None
        dx = dw = db = None
        if needs_x:
            dx = input_gradient(
                *(dy, weight, ctx.mode, ctx.ranks),
                is_early=gathering is None,
                is_last=not needs_weight,
            )
        if needs_bias:
            db = bias_gradient(dy, ctx.main_grads[1])
        if needs_weight:
            x = x if gathering is None else gathering.wait()
            dw = weight_gradient(ctx.order.arranged(dy), x, ctx.main_grads[0])
        return None if dx is None else dx.wait(), dw, db, None, None, None


class _RowLinear(torch.autograd.Function):
    """On (rows, in). Saves its input and the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ranks: Ranks,
        mode: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.main_grads = main_gradients(weight, bias)
        ctx.ranks, ctx.mode = ranks, mode
        if mode == "reduce_scatter":
            return linear_scatter(x, weight, bias, ranks, may_have_bias=True)
        return linear_all_reduce(x, weight, bias, ranks)

    @staticmethod
    @once_differentiable("row_linear", unless=_is_torchs)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dy = dy.contiguous()
        dx = dw = db = None
        if ctx.mode == "reduce_scatter" and needs_x:
            dx, dw, dy = row_gradients(
                dy, x, weight, ctx.main_grads[0], ctx.ranks, is_asked=needs_weight
            )
        else:
            if ctx.mode == "reduce_scatter":
                dy = start_all_gather(dy, ctx.ranks).wait()
            elif needs_x:
                dx = dy @ weight
            if needs_weight:
                dw = weight_gradient(dy, x, ctx.main_grads[0])
        if needs_bias:
            db = bias_gradient(dy, ctx.main_grads[1])
        return dx, dw, db, None, None


def column_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group = None,
    mode: str = "all_reduce",
    recompute_allgather: bool = True,
) -> Tensor:
    """x @ weight^T + bias with the output features split over the group.

    Args:
        x: (n, ..., in); with mode "reduce_scatter" this rank's share of dimension 0.
        weight: (out / size, in), this rank's rows. If it has a `main_grad` (fp32, its shape), the
            gradient is added to that and `grad` stays None; the bias likewise. With
            "reduce_scatter" it requires a gradient on all ranks or on none.
        bias: (out / size,).
        mode: "all_reduce" or "reduce_scatter".
        recompute_allgather: keep the shard of x for backward and gather it again there.

    Returns:
        (n, ..., out / size); with mode "reduce_scatter" dimension 0 is whole again.

    Raises:
        ValueError: shapes do not fit.
    """
    check_mode(mode)
    ranks = resolve(group)
    _check("column_linear", x, weight, bias)
    low, weight, bias = as_autocast(x, weight, bias)
    y = _ColumnLinear.apply(_rows(low), weight, bias, ranks, mode, recompute_allgather)
    first = x.shape[0] * (ranks.size if mode == "reduce_scatter" else 1)
    return y.view(first, *x.shape[1:-1], weight.shape[0]) if x.dim() != 2 else y


def row_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group = None,
    mode: str = "all_reduce",
) -> Tensor:
    """x @ weight^T + bias with the input features split over the group.

    Args:
        x: (n, ..., in / size).
        weight: (out, in / size), this rank's columns; for `main_grad` see `column_linear`.
        bias: (out,), on one rank of the group alone (Nanotron: rank 0), None on the others.
        mode: "all_reduce" or "reduce_scatter".

    Returns:
        (n, ..., out); with mode "reduce_scatter" this rank's share of dimension 0.

    Raises:
        ValueError: shapes do not fit. TopologyError: dimension 0 does not divide by the group's
            size.
    """
    check_mode(mode)
    ranks = resolve(group)
    size = ranks.size
    _check("row_linear", x, weight, bias)
    first = x.shape[0]
    if mode == "reduce_scatter":
        if first % size:
            raise TopologyError(f"row_linear: {first} rows do not scatter over tp={size}")
        first //= size
    low, weight, bias = as_autocast(x, weight, bias)
    y = _RowLinear.apply(_rows(low), weight, bias, ranks, mode)
    return y.view(first, *x.shape[1:-1], weight.shape[0]) if x.dim() != 2 else y
