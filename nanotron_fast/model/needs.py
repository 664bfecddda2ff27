"""What a model needs of the class that is to hold it, beyond what every decoder has.

A class says what it holds in the same words; what a model needs less that is refused. A field of
ModelSpec that changes what a model computes has a need here, or no class can be asked for it.
"""

from __future__ import annotations

from collections.abc import Callable

from nanotron_fast.model.spec import ModelSpec

# In the order in which they are refused.
_NEEDS: dict[str, Callable[[ModelSpec], bool]] = {
    "rope_scaling": lambda spec: spec.rope_scaling is not None,
    "head_dim": lambda spec: spec.head_dim * spec.num_heads != spec.hidden_size,
    "no_bias": lambda spec: not (spec.has_qkv_bias and spec.has_output_bias and spec.has_mlp_bias),
    "untied": lambda spec: not spec.tie_word_embeddings,
    "output_bias": lambda spec: spec.has_output_bias,
    "mlp_bias": lambda spec: spec.has_mlp_bias,
    "qkv_bias": lambda spec: spec.has_qkv_bias,
    "qk_norm": lambda spec: spec.has_qk_norm,
    "sliding_window": lambda spec: spec.sliding_window is not None,
    "no_rope_layers": lambda spec: spec.no_rope_interval is not None,
    "moe": lambda spec: spec.moe is not None,
}


def needs(spec: ModelSpec) -> tuple[str, ...]:
    """The names of what a model needs."""
    return tuple(name for name, is_needed in _NEEDS.items() if is_needed(spec))
