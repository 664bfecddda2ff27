"""OLMoE: experts on every layer, and norms of queries and keys over all heads at once."""

from __future__ import annotations

from nanotron_fast.families import olmo2
from nanotron_fast.families.decoder import ATTENTION, EMBEDDINGS, qk_norm
from nanotron_fast.families.family import Family
from nanotron_fast.families.moe import ExpertLayers, experts
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG

FAMILY = Family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=(*EMBEDDINGS, *ATTENTION, *qk_norm(whole=True), *experts()),
    defaults={
        **olmo2.DEFAULTS,
        "max_position_embeddings": 4096,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
    },
    renamed={"num_local_experts": "num_experts"},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    qk_norm="whole",
    quirks=(ExpertLayers(size="intermediate_size", has_dense_layers=False),),
    neutral=("clip_qkv",),
)
