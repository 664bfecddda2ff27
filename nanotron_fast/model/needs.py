"""What a model needs of the class that is to hold it, beyond what every decoder has.

A class says what it holds in the same words; what a model needs less that is refused. A field of
ModelSpec that changes what a model computes has a need here, or no class can be asked for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from nanotron_fast.model.spec import LEARNED_ACTIVATIONS, Attention, Experts, ModelSpec


def _has_no_rope_layers(spec: ModelSpec) -> bool:
    return bool(spec.no_rope_layers)


def _has_partial_rotary(spec: ModelSpec) -> bool:
    return any(
        each.attention.latent is None
        and each.attention.rotary not in (None, (0, each.attention.head_dim))
        for each in spec.layers
    )


def _any_attention(spec: ModelSpec, is_so: Callable[[Attention], bool]) -> bool:
    return any(is_so(each.attention) for each in spec.layers)


def _any_experts(spec: ModelSpec, is_so: Callable[[Experts], bool]) -> bool:
    return any(isinstance(each.mlp, Experts) and is_so(each.mlp) for each in spec.layers)


# What none of Nanotron's own classes has, in words that go on with "which Nanotron does not do".
ODDITIES: dict[str, tuple[Callable[[ModelSpec], bool], str]] = {
    "plain_layer_norm": (
        lambda spec: spec.norm == "plain_layer_norm",
        "its norms are LayerNorms without biases",
    ),
    "norm_places": (
        lambda spec: {*spec.norm_places} != {"before"},
        "its layers have norms elsewhere than before attention and before the MLP",
    ),
    "learned_activation": (
        lambda spec: spec.hidden_act in LEARNED_ACTIVATIONS,
        "its activation has parameters of its own",
    ),
    "norm_adds_one": (lambda spec: spec.norm_adds_one, "its norms' weights are stored less one"),
    "scales": (
        lambda spec: {spec.embedding_scale, spec.residual_scale, spec.logit_scale} != {1.0},
        "it multiplies embeddings, what layers add, or logits",
    ),
    "logit_softcap": (lambda spec: spec.logit_softcap is not None, "its logits are capped"),
    "softcap": (
        lambda spec: _any_attention(spec, lambda each: each.softcap is not None),
        "its attention's scores are capped",
    ),
    "attention_scale": (
        lambda spec: _any_attention(
            spec, lambda each: each.scale not in (None, each.head_dim**-0.5)
        ),
        "its attention's scores have a scale of their own",
    ),
    "some_rope_thetas": (
        lambda spec: _any_attention(spec, lambda each: each.rope_theta is not None),
        "some of its layers have a rotary embedding of their own",
    ),
    "sinks": (
        lambda spec: _any_attention(spec, lambda each: each.has_sinks),
        "its attention has sinks",
    ),
    "expert_bias": (
        lambda spec: _any_experts(spec, lambda each: each.has_bias),
        "its experts have biases",
    ),
    "clamped_glu": (
        lambda spec: _any_experts(spec, lambda each: each.clamped_glu is not None),
        "its experts clamp what they multiply",
    ),
    "latent": (
        lambda spec: _any_attention(spec, lambda each: each.latent is not None),
        "its keys and values are compressed (multi-head latent attention)",
    ),
    "renormalised": (
        lambda spec: _any_experts(spec, lambda each: each.is_renormalised),
        "it makes the weights of the chosen experts sum to 1 (norm_topk_prob)",
    ),
    "routing": (
        lambda spec: _any_experts(
            spec,
            lambda each: (
                replace(
                    each,
                    num_experts=1,
                    top_k=1,
                    intermediate_size=1,
                    shared_intermediate_size=1,
                    has_shared_expert=False,
                    has_shared_gate=True,
                    is_renormalised=False,
                    has_bias=False,
                    clamped_glu=None,
                )
                != Experts(1, 1, 1, 1, has_shared_expert=False)
            ),
        ),
        "its experts are chosen, or weighed, otherwise than by a plain softmax",
    ),
    "ungated_shared_expert": (
        lambda spec: _any_experts(
            spec, lambda each: each.has_shared_expert and not each.has_shared_gate
        ),
        "its shared expert has no gate",
    ),
}

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
    "qk_norm": lambda spec: spec.qk_norm is not None,
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
    **{name: is_needed for name, (is_needed, _) in ODDITIES.items()},
}

ALL_NEEDS = frozenset(_NEEDS)


def needs(spec: ModelSpec) -> tuple[str, ...]:
    """The names of what a model needs."""
    return tuple(name for name, is_needed in _NEEDS.items() if is_needed(spec))
