"""What a ModelSpec says of its layers, and what it needs of a class."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nanotron_fast.model.needs import ALL_NEEDS, needs
from nanotron_fast.model.spec import (
    COMPUTED,
    Attention,
    Dense,
    Experts,
    Latent,
    Layer,
    ModelSpec,
    differing_layer,
)

ATTENTION = Attention(4, 2, 16, (0, 16))
LAYER = Layer(ATTENTION, Dense(96))
SPEC = ModelSpec(
    hidden_size=64,
    layers=(LAYER,) * 4,
    intermediate_size=96,
    vocab_size=128,
    max_position_embeddings=64,
    hidden_act="silu",
    norm_eps=1e-6,
    initializer_range=0.02,
    rope_theta=1e4,
    tie_word_embeddings=True,
)
SPARSE = Experts(4, 2, 16, 0, has_shared_expert=False)


def changed(*layers: dict[str, Any]) -> ModelSpec:
    """With other attributes of attention layer by layer."""
    changes = zip(SPEC.layers, layers, strict=True)
    new = (replace(each, attention=replace(each.attention, **change)) for each, change in changes)
    return replace(SPEC, layers=tuple(new))


def test_a_plain_llama_needs_what_every_decoder_has() -> None:
    assert needs(SPEC) == ("rms_norm", "gated_mlp", "no_bias")
    assert SPEC.are_alike
    assert (SPEC.num_layers, SPEC.num_heads, SPEC.head_dim) == (4, 4, 16)
    assert SPEC.moe is None
    assert SPEC.moe_layers == ()


@pytest.mark.parametrize(
    ("without", "interval"),
    [((), None), ((1, 3), 2), ((3,), 4), ((0, 1, 2, 3), 1), ((2,), None), ((1,), None)],
)
def test_every_nth_layer_without_rotary_embedding(
    without: tuple[int, ...], interval: int | None
) -> None:
    spec = changed(*({"rotary": None} if layer in without else {} for layer in range(4)))
    assert spec.no_rope_layers == without
    assert spec.no_rope_interval == interval
    assert ("some_no_rope_layers" in needs(spec)) == (bool(without) and interval is None)
    assert spec.are_alike


def test_windows() -> None:
    everywhere = SPEC.with_attention(window=8)
    assert everywhere.sliding_window == 8
    assert "some_windows" not in needs(everywhere)
    some = changed({}, {"window": 8}, {}, {"window": 8})
    assert some.sliding_window is None
    assert some.windows == (None, 8, None, 8)
    assert {"sliding_window", "some_windows"} <= {*needs(some)}
    both = changed({"window": 8, "rotary": None}, {}, {}, {})
    assert "windows_without_rope" in needs(both)


def test_layers_of_other_sizes() -> None:
    experts = replace(SPEC, layers=(LAYER, Layer(ATTENTION, SPARSE)) * 2)
    assert experts.moe == SPARSE
    assert experts.moe_layers == (1, 3)
    assert experts.are_alike
    wide = changed({"num_heads": 8}, {}, {}, {})
    assert not wide.are_alike
    assert "unlike_layers" in needs(wide)


def test_every_need_can_arise() -> None:
    rich = replace(
        changed(
            {"rotary": (0, 8), "window": 4, "qk_norm": "head", "has_output_bias": True},
            {},
            {},
            {"rotary": None, "window": 8},
        ),
        rope_scaling={"rope_type": "linear", "factor": 2.0},
        tie_word_embeddings=False,
        hidden_size=100,
    )
    rich = replace(rich, layers=(*rich.layers, Layer(ATTENTION, SPARSE)))
    biased = replace(
        SPEC, norm="layer_norm", layers=(Layer(ATTENTION, Dense(96, True, is_gated=False)),)
    ).with_attention(has_qkv_bias=True, has_output_bias=True)
    odd = replace(
        SPEC,
        norm="plain_layer_norm",
        norm_adds_one=True,
        hidden_act="xielu",
        logit_scale=0.5,
        logit_softcap=30.0,
        layers=(
            replace(
                LAYER,
                norms="parallel",
                attention=replace(
                    ATTENTION,
                    scale=1.0,
                    softcap=50.0,
                    rope_theta=1e6,
                    has_sinks=True,
                    latent=Latent(8, 8, 8),
                ),
                mlp=replace(
                    SPARSE,
                    has_shared_expert=True,
                    has_shared_gate=False,
                    scoring="sigmoid",
                    is_renormalised=True,
                    has_bias=True,
                    clamped_glu=(1.0, 7.0),
                ),
            ),
        ),
    )
    assert {*needs(rich), *needs(biased), *needs(odd)} == ALL_NEEDS


def test_what_differs_between_layers() -> None:
    assert differing_layer(SPEC, SPEC) is None
    other = changed({}, {}, {"window": 8}, {})
    assert differing_layer(SPEC, other) == ("window of layer 2", None, 8)
    sparse = replace(SPEC, layers=(*SPEC.layers[:3], Layer(ATTENTION, SPARSE)))
    assert differing_layer(SPEC, sparse) == ("the mlp of layer 3", "Dense", "Experts")
    assert all(hasattr(SPEC, name) for name in COMPUTED)
