"""Qwen3-MoE: Qwen3 with experts, whose weights may be made to sum to 1, and no shared one."""

from __future__ import annotations

from nanotron_fast.families import qwen3
from nanotron_fast.families.decoder import ATTENTION, EMBEDDINGS, mlp, qk_norm
from nanotron_fast.families.family import Family
from nanotron_fast.families.moe import ExpertLayers, experts
from nanotron_fast.families.windows import SWITCHED
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG

FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=(
        *EMBEDDINGS,
        *ATTENTION,
        *qk_norm(),
        *mlp("mlp", "mlp", "intermediate", layers="dense"),
        *experts(),
    ),
    defaults={
        **qwen3.DEFAULTS,
        "head_dim": None,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
    },
    renamed={"num_local_experts": "num_experts"},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    qk_norm="head",
    quirks=(SWITCHED, ExpertLayers()),
    writes_head_dim=True,
)
