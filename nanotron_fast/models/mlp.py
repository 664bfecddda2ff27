"""The dense MLP of a layer, or of an expert that all tokens share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanotron_fast.checkpoints.activations import ACTIVATIONS
from nanotron_fast.kernels.glu import glu
from nanotron_fast.model.spec import LEARNED_ACTIVATIONS
from nanotron_fast.models.weights import Setting, Weights
from nanotron_fast.parallel import column_linear, row_linear, tensor_parallel_mlp

# Nanotron's names of what the fused functions compute.
FUSED = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) * up of (..., [gate | up]), for any of Nanotron's activations."""
    if activation in FUSED:
        return glu(gate_up, FUSED[activation])
    gate, up = gate_up.chunk(2, -1)
    return ACTIVATIONS[activation](gate) * up


class Xielu(nn.Module):
    """An activation whose two slopes a layer learns (arXiv:2411.13010), of (tokens, rows).

    With p = softplus(alpha_p) and n = beta + softplus(alpha_n), both parameters of one element:
    p * x^2 + beta * x above 0, and n * (expm1(min(x, eps)) - x) + beta * x from 0 down.
    """

    def __init__(self) -> None:
        super().__init__()
        for name in ("alpha_p", "alpha_n", "beta", "eps"):
            self.register_parameter(name, None)

    alpha_p: nn.Parameter
    alpha_n: nn.Parameter
    beta: nn.Parameter
    eps: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        positive, negative = F.softplus(self.alpha_p), self.beta + F.softplus(self.alpha_n)
        above = positive * x * x
        below = (torch.expm1(torch.minimum(x, self.eps)) - x) * negative
        return torch.where(x > 0, above, below) + self.beta * x


class Mlp(nn.Module):
    """Takes and gives (tokens, hidden), or this rank's share of the tokens."""

    def __init__(self, setting: Setting, *, is_gated: bool = True) -> None:
        super().__init__()
        self.setting, self.is_gated = setting, is_gated
        self.add_module(setting.names.up, Weights(may_have_bias=True))
        self.add_module(setting.names.down, Weights(may_have_bias=True))
        if setting.spec.hidden_act in LEARNED_ACTIVATIONS:
            self.act_fn = Xielu()

    def forward(self, x: Tensor) -> Tensor:
        setting, activation = self.setting, self.setting.spec.hidden_act
        parallel = {"group": setting.group, "mode": setting.mode}
        up = self.get_submodule(setting.names.up)
        down = self.get_submodule(setting.names.down)
        has_bias = up.bias is not None or down.bias is not None
        if self.is_gated and not has_bias and activation in FUSED:
            return tensor_parallel_mlp(
                x,
                up.weight,
                down.weight,
                activation=FUSED[activation],
                recompute=setting.recompute,
                **parallel,
            )
        h = column_linear(x, up.weight, up.bias, **parallel)
        if activation in LEARNED_ACTIVATIONS:
            h = self.act_fn(h)
        else:
            h = gated(h, activation) if self.is_gated else ACTIVATIONS[activation](h)
        out = row_linear(h, down.weight, **parallel)
        # Every rank has the whole bias, and adds it once: after the sum over ranks.
        return out if down.bias is None else out + down.bias
