"""The gated unit of the MLPs: act(gate) * up on packed halves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nanotron_fast.kernels.glu import glu
from nanotron_fast.patch.hooks import may_go_past
from nanotron_fast.patch.nanotron.targets import DropInOptions

# Nanotron's activations, by the name of their class, that are one of ours.
_ACTIVATIONS = {
    "SiLUActivation": "silu",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}


def activation_of(act: Any) -> str | None:
    """Our name of an activation of Nanotron's; None where it is not ours, or is watched."""
    if not may_go_past(act):
        return None
    if type(act).__name__ == "GELUActivation":
        return "gelu" if act.act is nn.functional.gelu else None
    return _ACTIVATIONS.get(type(act).__name__)


def glu_activation(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`GLUActivation.forward`; other activations than silu and gelu, and those
    that somebody watches, are left to the original.
    """

    def forward(self: Any, merged_states: Tensor) -> Tensor:
        activation = activation_of(self.act)
        if activation is None:
            return original(self, merged_states)
        return glu(merged_states, activation)

    return forward


def qwen2_mlp(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`Qwen2MLP.forward`."""

    def forward(self: Any, hidden_states: Tensor) -> dict[str, Tensor]:
        activation = activation_of(self.act)
        if activation is None:
            return original(self, hidden_states)
        merged = self.gate_up_proj(hidden_states)
        return {"hidden_states": self.down_proj(glu(merged, activation))}

    return forward
