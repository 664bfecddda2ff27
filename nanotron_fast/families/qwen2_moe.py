"""Qwen2-MoE: experts on some layers, and one that all tokens share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.families.decoder import ATTENTION, BLOCK, EMBEDDINGS, LAYER, mlp
from nanotron_fast.families.family import Family
from nanotron_fast.families.qwen2 import DEFAULTS
from nanotron_fast.families.rules import Copy, Rule, StackExperts
from nanotron_fast.families.windows import Windows
from nanotron_fast.formats.fields import MAX_COUNT, Fields
from nanotron_fast.formats.nanotron.classes import QWEN2_CONFIG
from nanotron_fast.model.spec import Experts, Layer, ModelSpec

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

# Other names under which some classes keep what a mixture of experts has.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("moe_topk", "moe_k"),
}


@dataclass(frozen=True, slots=True)
class ExpertLayers:
    """Experts on every decoder_sparse_step-th layer, those of mlp_only_layers left out."""

    keys: frozenset[str] = frozenset({"num_experts", *_ALIASES["num_experts"]})
    expresses: frozenset[str] = frozenset({"moe"})
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _ALIASES)

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Gives layers their experts. Raises ConfigError, UnsupportedModelError."""
        if reader.flag("norm_topk_prob"):
            raise UnsupportedModelError(
                "config.json: norm_topk_prob is true. Nanotron does not renormalise the weights of "
                "the chosen experts, and would compute something else"
            )
        step = reader.positive("decoder_sparse_step")
        dense = set(reader.indices("mlp_only_layers"))
        num_experts = reader.positive("num_experts", MAX_COUNT)
        top_k = reader.positive("num_experts_per_tok")
        if top_k > num_experts:
            raise ConfigError(
                f"config.json: num_experts_per_tok is {top_k}, and num_experts is {num_experts}: "
                "no token can be sent to more experts than there are"
            )
        experts = Experts(
            num_experts=num_experts,
            top_k=top_k,
            intermediate_size=reader.positive("moe_intermediate_size"),
            shared_intermediate_size=reader.positive("shared_expert_intermediate_size"),
            has_shared_expert=True,
        )
        fields["router_aux_loss_coef"] = reader.number("router_aux_loss_coef")
        fields["layers"] = [
            each if layer in dense or (layer + 1) % step else replace(each, mlp=experts)
            for layer, each in enumerate(fields["layers"])
        ]

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds its keys, where there are experts."""
        moe = spec.moe
        if moe is None:
            return
        config["num_experts"] = moe.num_experts
        config["num_experts_per_tok"] = moe.top_k
        config["moe_intermediate_size"] = moe.intermediate_size
        config["shared_expert_intermediate_size"] = moe.shared_intermediate_size
        config["decoder_sparse_step"] = 1
        config["mlp_only_layers"] = [
            layer for layer in range(spec.num_layers) if layer not in spec.moe_layers
        ]
        config["norm_topk_prob"] = False
        config["router_aux_loss_coef"] = spec.router_aux_loss_coef


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
    quirks=(Windows(older=_ambiguous), ExpertLayers()),
    recognises=lambda model_config: model_config.get("moe_config") is not None,
)
