"""Qwen2-MoE: experts on some layers, and one that all tokens share."""

from __future__ import annotations

from nanotron_fast.families.decoder import ATTENTION, BLOCK, EMBEDDINGS, LAYER, mlp
from nanotron_fast.families.family import Family
from nanotron_fast.families.qwen2 import DEFAULTS
from nanotron_fast.families.rules import Copy, Rule, StackExperts
from nanotron_fast.formats.nanotron.classes import QWEN2_CONFIG

RULES: tuple[Rule, ...] = (
    *EMBEDDINGS,
    *ATTENTION,
    *mlp("mlp", "mlp", "intermediate", layers="dense"),
    Copy(
        f"{LAYER}mlp.gate.weight",
        f"{BLOCK}mlp.router.weight",
        rows="experts",
        columns="hidden",
        layers="moe",
        is_fp32=True,
    ),
    StackExperts(
        (
            f"{LAYER}mlp.experts.{{expert}}.gate_proj.weight",
            f"{LAYER}mlp.experts.{{expert}}.up_proj.weight",
        ),
        f"{LAYER}mlp.experts.gate_up_proj",
        f"{BLOCK}mlp.experts.merged_gate_up_proj",
        rows="moe_intermediate",
        columns="hidden",
    ),
    StackExperts(
        (f"{LAYER}mlp.experts.{{expert}}.down_proj.weight",),
        f"{LAYER}mlp.experts.down_proj",
        f"{BLOCK}mlp.experts.merged_down_proj",
        rows="hidden",
        columns="moe_intermediate",
    ),
    *mlp(
        "mlp.shared_expert",
        "mlp.shared_expert",
        "shared_intermediate",
        layers="moe",
        when="shared_expert",
    ),
    Copy(
        f"{LAYER}mlp.shared_expert_gate.weight",
        f"{BLOCK}mlp.shared_expert_gate.weight",
        rows="one",
        columns="hidden",
        layers="moe",
        when="shared_expert",
    ),
)

QWEN2_MOE = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    model_class=QWEN2_CONFIG,
    rules=RULES,
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
    },
    qkv_bias="qkv_bias",
    window="qwen",
    is_moe=True,
)
