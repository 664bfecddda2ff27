"""Arcee: a Llama whose MLP has no gate, and a squared ReLU."""

from __future__ import annotations

from nanotron_fast.families.decoder import ATTENTION, DEFAULTS, EMBEDDINGS, plain_mlp
from nanotron_fast.families.family import Family
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG

FAMILY = Family(
    name="arcee",
    architecture="ArceeForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=(*EMBEDDINGS, *ATTENTION, *plain_mlp()),
    defaults={
        **DEFAULTS,
        "hidden_act": "relu2",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "attention_bias": False,
        "mlp_bias": False,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    has_gated_mlp=False,
    writes_head_dim=True,
)
