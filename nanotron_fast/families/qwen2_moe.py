"""Qwen2-MoE: experts on some layers, and one that all tokens share."""

from __future__ import annotations

from collections.abc import Sequence

from nanotron_fast.errors import UnsupportedModelError
from nanotron_fast.families.decoder import ATTENTION, BLOCK, EMBEDDINGS, LAYER, mlp
from nanotron_fast.families.family import Family
from nanotron_fast.families.moe import ExpertLayers, experts
from nanotron_fast.families.qwen2 import DEFAULTS
from nanotron_fast.families.rules import Copy, Rule
from nanotron_fast.families.windows import Windows
from nanotron_fast.formats.fields import Fields
from nanotron_fast.formats.nanotron.classes import QWEN2_CONFIG
from nanotron_fast.model.spec import Layer

RULES: tuple[Rule, ...] = (
    *EMBEDDINGS,
    *ATTENTION,
    *mlp("mlp", "mlp", "intermediate", layers="dense"),
    *experts(),
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
        when="shared_gate",
    ),
)


def _ambiguous(reader: Fields, layers: Sequence[Layer]) -> list[bool]:
    raise UnsupportedModelError(
        "config.json: use_sliding_window without layer_types: transformers 4 puts the window "
        "on the layers from max_window_layers on, transformers 5 on every other layer before "
        "it; say which with layer_types"
    )


FAMILY = Family(
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
    quirks=(
        Windows(older=_ambiguous),
        ExpertLayers(shared_size="shared_expert_intermediate_size"),
    ),
    recognises=lambda model_config: model_config.get("moe_config") is not None,
)
