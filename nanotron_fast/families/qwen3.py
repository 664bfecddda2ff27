"""Qwen3: queries and keys are normalised head by head, and heads have a size of their own."""

from __future__ import annotations

from nanotron_fast.families import qwen2
from nanotron_fast.families.decoder import DENSE, qk_norm
from nanotron_fast.families.family import Family
from nanotron_fast.families.windows import UPPER_LAYERS
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG

DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128, "attention_bias": False}

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=(*DENSE, *qk_norm()),
    defaults=DEFAULTS,
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    qk_norm="head",
    quirks=(UPPER_LAYERS,),
    writes_head_dim=True,
)
