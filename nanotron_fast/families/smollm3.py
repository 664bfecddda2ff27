"""SmolLM3: every n-th layer has no rotary embedding."""

from __future__ import annotations

from nanotron_fast.families.decoder import DENSE
from nanotron_fast.families.family import Family
from nanotron_fast.families.qwen2 import DEFAULTS
from nanotron_fast.formats.nanotron.classes import QWEN2_CONFIG

SMOLLM3 = Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    model_class=QWEN2_CONFIG,
    rules=DENSE,
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "sliding_window": None,
        "rope_theta": 2000000.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "pad_token_id": 128004,
        "attention_bias": False,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "pretraining_tp": 1,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    window="qwen",
    has_no_rope_layers=True,
    extras=("pretraining_tp",),
)
