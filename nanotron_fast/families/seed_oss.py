"""Seed-OSS: biases on q, k and v, and heads of a size of their own."""

from __future__ import annotations

from nanotron_fast.families.decoder import DEFAULTS, DENSE
from nanotron_fast.families.family import Family
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG

FAMILY = Family(
    name="seed_oss",
    architecture="SeedOssForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=DENSE,
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
        "pretraining_tp": 1,
    },
    qkv_bias="attention_bias",
    output_bias="attention_out_bias",
    mlp_bias="mlp_bias",
    writes_head_dim=True,
    extras=("attention_dropout", "residual_dropout", "pretraining_tp"),
)
