"""What a model needs of the class that is to hold it, beyond what every decoder has.

A class says what it holds in the same words; what a model needs less that is refused. A field of
ModelSpec that changes what a model computes has a need here, or no class can be asked for it.
"""

from __future__ import annotations

from collections.abc import Callable

from nanotron_fast.model.spec import ModelSpec


def _has_no_rope_layers(spec: ModelSpec) -> bool:
    return bool(spec.no_rope_layers)


def _has_partial_rotary(spec: ModelSpec) -> bool:
    return any(
        each.attention.rotary not in (None, (0, each.attention.head_dim)) for each in spec.layers
    )


# In the order in which they are refused.
_NEEDS: dict[str, Callable[[ModelSpec], bool]] = {
    "rms_norm": lambda spec: spec.norm == "rms_norm",
    "layer_norm": lambda spec: spec.norm == "layer_norm",
    "gated_mlp": lambda spec: spec.has_gated_mlp,
    "plain_mlp": lambda spec: not spec.has_gated_mlp,
    "rope_scaling": lambda spec: spec.rope_scaling is not None,
    "head_dim": lambda spec: spec.head_dim * spec.num_heads != spec.hidden_size,
    "no_bias": lambda spec: not (spec.has_qkv_bias and spec.has_output_bias and spec.has_mlp_bias),
    "untied": lambda spec: not spec.tie_word_embeddings,
    "output_bias": lambda spec: spec.has_output_bias,
    "mlp_bias": lambda spec: spec.has_mlp_bias,
    "qkv_bias": lambda spec: spec.has_qkv_bias,
    "qk_norm": lambda spec: spec.has_qk_norm,
    "sliding_window": lambda spec: any(spec.windows),
    "some_windows": lambda spec: len(set(spec.windows)) > 1,
    "no_rope_layers": _has_no_rope_layers,
    "some_no_rope_layers": lambda spec: _has_no_rope_layers(spec) and spec.no_rope_interval is None,
    "windows_without_rope": lambda spec: any(
        each.attention.rotary is None and each.attention.window for each in spec.layers
    ),
    "partial_rotary": _has_partial_rotary,
    "moe": lambda spec: spec.moe is not None,
    "unlike_layers": lambda spec: not spec.are_alike,
}

ALL_NEEDS = frozenset(_NEEDS)


def needs(spec: ModelSpec) -> tuple[str, ...]:
    """The names of what a model needs."""
    return tuple(name for name, is_needed in _NEEDS.items() if is_needed(spec))
