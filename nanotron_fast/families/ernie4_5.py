"""ERNIE 4.5 without experts: a Llama whose rotary embedding turns neighbours."""

from __future__ import annotations

from nanotron_fast.families.decoder import DEFAULTS, DENSE
from nanotron_fast.families.family import Family
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG

FAMILY = Family(
    name="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=DENSE,
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "use_bias": False,
        "pad_token_id": 0,
    },
    qkv_bias="use_bias",
    output_bias="use_bias",
    mlp_bias="use_bias",
    rotates_neighbours=True,
    writes_head_dim=True,
)
