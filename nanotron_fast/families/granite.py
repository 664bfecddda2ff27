"""Granite: a Llama with four multipliers, of embeddings, scores, what layers add, and logits."""

from __future__ import annotations

from nanotron_fast.families.decoder import DEFAULTS, DENSE
from nanotron_fast.families.factors import Factor, ScoreScale
from nanotron_fast.families.family import Family
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG

FAMILY = Family(
    name="granite",
    architecture="GraniteForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=DENSE,
    defaults={
        **DEFAULTS,
        "num_key_value_heads": None,
        "attention_bias": False,
        "mlp_bias": False,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    quirks=(
        Factor("embedding_multiplier", "embedding_scale"),
        Factor("residual_multiplier", "residual_scale"),
        Factor("logits_scaling", "logit_scale", divides=True),
        ScoreScale("attention_multiplier", 1),
    ),
)
