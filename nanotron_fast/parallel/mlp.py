"""The gated MLP of a tensor-parallel layer as one function, from its input shard to its output.

    y = sum over ranks of (act(x Wg^T) * (x Wu^T)) Wd^T

Saved for backward: x's shard, and gate_up unless it is recomputed from it. The activation's output
is never saved: backward computes it again in the pass that makes gate_up's gradient. There, x is
gathered again and the input's gradient is summed while the weights' gradients are computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanotron_fast.kernels.glu import glu_backward, glu_forward
from nanotron_fast.kernels.matmul import matmul_glu, prefers_fused
from nanotron_fast.kernels.runtime.autocast import as_autocast
from nanotron_fast.kernels.runtime.collectives import Group, Ranks, resolve
from nanotron_fast.kernels.runtime.main_grad import main_gradients
from nanotron_fast.kernels.runtime.once import once_differentiable
from nanotron_fast.parallel.chunks import AS_THEY_ARE
from nanotron_fast.parallel.communication import check_mode, start_all_gather
from nanotron_fast.parallel.products import (
    gather_linear,
    input_gradient,
    linear_all_reduce,
    linear_scatter,
    weight_gradient,
)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up_weight: Tensor,
        down_weight: Tensor,
        ranks: Ranks,
        mode: str,
        activation: str,
        recompute: bool,
    ) -> Tensor:
        scatters = mode == "reduce_scatter" and ranks.size > 1
        gate_up = None
        # Where x is gathered first, the product runs in chunks beside that instead: all ranks must
        # communicate alike, and each measures for itself whether the fused product is faster.
        if not scatters and prefers_fused(
            "glu" if recompute else "glu_save",
            tokens=x.shape[0],
            hidden=x.shape[1],
            out=gate_up_weight.shape[0],
            dtype=x.dtype,
            device=x.device,
        ):
            h = matmul_glu(x, gate_up_weight, activation, save_gate_up=not recompute)
            if not recompute:
                h, gate_up = h
        else:
            if scatters:
                gate_up, _, _ = gather_linear(x, gate_up_weight, None, ranks, keeps_gathered=False)
            else:
                gate_up = torch.nn.functional.linear(x, gate_up_weight)
            h = glu_forward(gate_up, activation)
        ctx.save_for_backward(x, gate_up_weight, down_weight, None if recompute else gate_up)
        ctx.main_grads = main_gradients(gate_up_weight, down_weight)
        ctx.ranks, ctx.mode, ctx.activation = ranks, mode, activation
        return (linear_scatter if scatters else linear_all_reduce)(h, down_weight, None, ranks)

    @staticmethod
    @once_differentiable("tensor_parallel_mlp")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up_weight, down_weight, gate_up = ctx.saved_tensors
        needs_x, needs_gate_up, needs_down = ctx.needs_input_grad[:3]
        ranks, scatters = ctx.ranks, ctx.mode == "reduce_scatter"
        dy = dy.contiguous()
        gathering, x_order, dy_order = None, AS_THEY_ARE, AS_THEY_ARE
        if scatters:
            regathers = gate_up is not None
            if gate_up is None:
                gate_up, x, x_order = gather_linear(
                    x, gate_up_weight, None, ranks, keeps_gathered=needs_gate_up
                )
            dh, dy, dy_order = gather_linear(
                dy, down_weight.t(), None, ranks, keeps_gathered=needs_down
            )
            # Behind dy, which is needed first: beside the passes and the product for dx.
            if regathers and needs_gate_up:
                gathering = start_all_gather(x, ranks)
        else:
            if gate_up is None:
                gate_up = torch.nn.functional.linear(x, gate_up_weight)
            dh = dy @ down_weight
        d_gate_up, h = glu_backward(dh, gate_up, ctx.activation, with_output=True)
        del dh, gate_up
        dx = d_down = dw = None
        if needs_x:
            dx = input_gradient(
                *(d_gate_up, gate_up_weight, ctx.mode, ranks),
                is_early=gathering is None,
                is_last=not (needs_down or needs_gate_up),
            )
        if needs_down:
            d_down = weight_gradient(dy, dy_order.arranged(h), ctx.main_grads[1])
        if needs_gate_up:
            x = x if gathering is None else gathering.wait()
            dw = weight_gradient(x_order.arranged(d_gate_up), x, ctx.main_grads[0])
        return None if dx is None else dx.wait(), dw, d_down, None, None, None, None


def tensor_parallel_mlp(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    *,
    group: Group = None,
    mode: str = "all_reduce",
    activation: str = "silu",
    recompute: bool = True,
) -> Tensor:
    """A gated MLP whose intermediate features are split over a group.

    Args:
        x: (tokens, hidden), the same on every rank; with mode "reduce_scatter" (tokens / size,
            hidden), this rank's tokens.
        gate_up_weight: (2 * inter / size, hidden), this rank's rows packed [gate | up].
        down_weight: (hidden, inter / size), this rank's columns. Weights that have a `main_grad`
            (fp32, their shape) get their gradients added to it, and `grad` stays None. With
            "reduce_scatter" a weight requires a gradient on all ranks or on none.
        group: a ProcessGroup, a DeviceMesh of one dimension, or None for a rank alone.
        mode: "all_reduce" or "reduce_scatter" (sequence parallelism).
        activation: "silu", "gelu" or "gelu_tanh".
        recompute: save x alone and compute gate_up again in backward (a third of the forward's
            products), rather than save it: 2 * inter / size values a token.

    Returns:
        x's shape and dtype; autocast's dtype where it is on.

    Raises:
        ValueError: shapes do not fit. TopologyError: tokens do not scatter over the group.
    """
    check_mode(mode)
    ranks = resolve(group)
    hidden, inter = x.shape[-1], down_weight.shape[-1]
    shapes = (gate_up_weight.shape, down_weight.shape)
    if x.dim() != 2 or shapes != ((2 * inter, hidden), (hidden, inter)):
        raise ValueError(
            f"tensor_parallel_mlp: x {tuple(x.shape)}, gate_up_weight "
            f"{tuple(gate_up_weight.shape)}, down_weight {tuple(down_weight.shape)}: they should "
            "be (tokens, hidden), (2 * inter, hidden), (hidden, inter)"
        )
    operands = as_autocast(x, gate_up_weight, down_weight)
    return _Mlp.apply(*operands, ranks, mode, activation, recompute)
