"""A released model as its config.json describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanotron_fast import Topology

GLM = {"head_dim": 128, "vocab_size": 151552, "attention_bias": True, "partial_rotary_factor": 0.5}


@dataclass(frozen=True)
class Released:
    """One model.

    Args:
        config: of its config.json, what is not its class's default.
        billions: of its parameters.
        topology: that one would train it with.
    """

    config: Mapping[str, Any]
    billions: float
    topology: Topology


def sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
