"""Apertus: norms of queries and keys, and an MLP without a gate whose activation has parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanotron_fast.families.decoder import (
    BLOCK,
    DEFAULTS,
    EMBEDDINGS,
    LAYER,
    PROJECTIONS,
    norms,
    plain_mlp,
    qk_norm,
)
from nanotron_fast.families.family import Family
from nanotron_fast.families.own_scaling import OwnScaling
from nanotron_fast.families.quirk import Quirk
from nanotron_fast.families.rules import Number, Rule
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG

_NAMES = {
    "input_layernorm": "attention_layernorm",
    "pre_feedforward_layernorm": "feedforward_layernorm",
}
_SCALING = OwnScaling(
    "llama3's by a factor of 8",
    unsaid={
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
)


def _number(name: str, initial: float, *, is_frozen: bool = False) -> Rule:
    return Number(
        f"{LAYER}mlp.act_fn.{name}",
        f"{BLOCK}mlp.act_fn.{name}",
        initial,
        is_scalar=is_frozen,
        is_frozen=is_frozen,
        when="learned_activation",
    )


def _softplus_is(value: float) -> float:
    return math.log(math.expm1(value))


# Slopes of 0.8 on both sides of 0, as models start with.
_ACTIVATION: tuple[Rule, ...] = (
    _number("alpha_p", _softplus_is(0.8)),
    _number("alpha_n", _softplus_is(0.8 - 0.5)),
    _number("beta", 0.5, is_frozen=True),
    _number("eps", -1e-6, is_frozen=True),
)


@dataclass(frozen=True, slots=True)
class LearnedActivation(Quirk):
    """`hidden_act: xielu`, which has parameters; no other key says so."""

    expresses: frozenset[str] = frozenset({"learned_activation"})


FAMILY = Family(
    name="apertus",
    architecture="ApertusForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=(
        *EMBEDDINGS,
        *norms("input_layernorm", hf=_NAMES),
        *PROJECTIONS,
        *qk_norm(),
        *norms("pre_feedforward_layernorm", hf=_NAMES),
        *plain_mlp(),
        *_ACTIVATION,
    ),
    defaults={
        **DEFAULTS,
        "num_key_value_heads": None,
        "hidden_act": "xielu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 12000000.0,
        "max_position_embeddings": 65536,
        "pad_token_id": 3,
        "attention_bias": False,
        "attention_dropout": 0.0,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    qk_norm="head",
    has_gated_mlp=False,
    rope=_SCALING.rope,
    quirks=(LearnedActivation(), _SCALING),
    extras=("attention_dropout",),
)
