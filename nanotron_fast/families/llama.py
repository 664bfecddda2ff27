"""Llama."""

from __future__ import annotations

from nanotron_fast.families.decoder import DEFAULTS, DENSE
from nanotron_fast.families.family import Family
from nanotron_fast.formats.nanotron.classes import LLAMA_CONFIG, QWEN2_CONFIG

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_class=LLAMA_CONFIG,
    other_classes=(QWEN2_CONFIG,),
    rules=DENSE,
    defaults={
        **DEFAULTS,
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    recognises=lambda model_config: True,
    writes_head_dim=True,
    extras=("pretraining_tp",),
)
