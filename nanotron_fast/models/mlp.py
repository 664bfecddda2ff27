"""The gated MLP of a layer, or of an expert that all tokens share."""

from __future__ import annotations

from torch import Tensor, nn

from nanotron_fast.checkpoints.activations import ACTIVATIONS
from nanotron_fast.kernels.glu import glu
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


class Mlp(nn.Module):
    """Takes and gives (tokens, hidden), or this rank's share of the tokens."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting
        self.gate_up_proj = Weights()
        self.down_proj = Weights()

    def forward(self, x: Tensor) -> Tensor:
        setting, activation = self.setting, self.setting.spec.hidden_act
        parallel = {"group": setting.group, "mode": setting.mode}
        gate_up, down = self.gate_up_proj, self.down_proj
        if gate_up.bias is None and down.bias is None and activation in FUSED:
            return tensor_parallel_mlp(
                x,
                gate_up.weight,
                down.weight,
                activation=FUSED[activation],
                recompute=setting.recompute,
                **parallel,
            )
        packed = column_linear(x, gate_up.weight, gate_up.bias, **parallel)
        out = row_linear(gated(packed, activation), down.weight, **parallel)
        # Every rank has the whole bias, and adds it once: after the sum over ranks.
        return out if down.bias is None else out + down.bias
