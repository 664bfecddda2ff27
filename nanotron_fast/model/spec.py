"""A model's architecture, in words that belong to neither format.

A family reads a `config.json` into a `ModelSpec` and back; a Nanotron model class reads a
`model_config.json` into one and back. Everything between the two formats goes through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Activations that Nanotron's ACT2FN knows (nanotron/nn/activations.py at 2411b022).
NANOTRON_ACTIVATIONS = frozenset(
    [
        "gelu",
        "gelu_10",
        "gelu_fast",
        "gelu_new",
        "gelu_python",
        "gelu_pytorch_tanh",
        "gelu_accurate",
        "laplace",
        "linear",
        "mish",
        "quick_gelu",
        "relu",
        "relu2",
        "relu6",
        "sigmoid",
        "silu",
        "swish",
        "tanh",
    ]
)


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """A mixture of experts, on the layers that have one."""

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int
    has_shared_expert: bool
    layers: tuple[int, ...]
    router_aux_loss_coef: float


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The architecture of a decoder. Sizes in elements; None where a model has no such thing."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    hidden_act: str
    norm_eps: float
    initializer_range: float
    rope_theta: float
    tie_word_embeddings: bool
    rope_scaling: Mapping[str, Any] | None = None
    # Biases on q, k and v; on the attention's output; in the MLP.
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    # Queries and keys are normalised, head by head, before the rotary embedding.
    has_qk_norm: bool = False
    # A query sees its last `sliding_window` keys, itself included, on every layer.
    sliding_window: int | None = None
    # Layers i with (i + 1) % no_rope_interval == 0 have no rotary embedding.
    no_rope_interval: int | None = None
    moe: MoeSpec | None = None
    # As in config.json: an id, a list of ids, or nothing.
    bos_token_id: Any = None
    eos_token_id: Any = None
    pad_token_id: Any = None
    use_cache: bool = True
    # Kept by both formats, used by neither: `pretraining_tp`, dropout rates.
    extras: Mapping[str, Any] = field(default_factory=dict)

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim
