"""Mixtral: a Mistral with experts on every layer, whose weights are made to sum to 1."""

from __future__ import annotations

from nanotron_fast.families.decoder import ATTENTION, DEFAULTS, EMBEDDINGS
from nanotron_fast.families.family import Family
from nanotron_fast.families.moe import LOCAL_EXPERTS, experts
from nanotron_fast.families.windows import PLAIN
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG

FAMILY = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=(
        *EMBEDDINGS,
        *ATTENTION,
        *experts("block_sparse_moe", gate="w1", up="w3", down="w2", newer="mlp"),
    ),
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 131072,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
    renamed={"num_experts": "num_local_experts"},
    quirks=(
        PLAIN,
        LOCAL_EXPERTS,
    ),
)
