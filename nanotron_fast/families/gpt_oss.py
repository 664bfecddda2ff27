"""gpt-oss: attention sinks, and experts with biases, clamped, whose columns lie in turns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nanotron_fast.families.decoder import ATTENTION, BLOCK, DEFAULTS, EMBEDDINGS, LAYER
from nanotron_fast.families.expert_rules import InterleavedExperts
from nanotron_fast.families.family import Family
from nanotron_fast.families.moe import LOCAL_EXPERTS
from nanotron_fast.families.own_scaling import OwnScaling
from nanotron_fast.families.quirk import Quirk
from nanotron_fast.families.rules import Copy, Rule
from nanotron_fast.families.windows import EVERY_OTHER
from nanotron_fast.formats.fields import Fields
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG
from nanotron_fast.model.spec import Experts, Layer, ModelSpec

_HF, _OURS = f"{LAYER}mlp.", f"{BLOCK}mlp."
_SCALING = OwnScaling("its own YaRN")

RULES: tuple[Rule, ...] = (
    *EMBEDDINGS,
    *ATTENTION,
    Copy(
        f"{LAYER}self_attn.sinks",
        f"{BLOCK}attn.sinks",
        rows="heads",
        split="rows",
        when="sinks",
    ),
    Copy(
        f"{_HF}router.weight",
        f"{_OURS}router.weight",
        rows="experts",
        columns="hidden",
        layers="moe",
        is_fp32=True,
    ),
    Copy(
        f"{_HF}router.bias",
        f"{_OURS}router.bias",
        rows="experts",
        layers="moe",
        when="expert_bias",
        is_fp32=True,
    ),
    InterleavedExperts(
        f"{_HF}experts.gate_up_proj",
        f"{_OURS}experts.merged_gate_up_proj",
        rows="hidden",
        columns="moe_intermediate",
        num_matrices=2,
    ),
    InterleavedExperts(
        f"{_HF}experts.gate_up_proj_bias",
        f"{_OURS}experts.merged_gate_up_bias",
        columns="moe_intermediate",
        num_matrices=2,
        when="expert_bias",
    ),
    InterleavedExperts(
        f"{_HF}experts.down_proj",
        f"{_OURS}experts.merged_down_proj",
        rows="moe_intermediate",
        columns="hidden",
    ),
    InterleavedExperts(
        f"{_HF}experts.down_proj_bias",
        f"{_OURS}experts.merged_down_bias",
        columns="hidden",
        when="expert_bias",
    ),
)


@dataclass(frozen=True, slots=True)
class _Oddities(Quirk):
    """Sinks in every layer, biases in all experts, and what those clamp."""

    keys: frozenset[str] = frozenset({"swiglu_alpha", "swiglu_limit"})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Changes every layer."""
        glu = reader.number("swiglu_alpha"), reader.number("swiglu_limit")

        def changed(layer: Layer) -> Layer:
            assert isinstance(layer.mlp, Experts)
            return replace(
                layer,
                attention=replace(layer.attention, has_sinks=True),
                mlp=replace(layer.mlp, has_bias=True, clamped_glu=glu),
            )

        fields["layers"] = [changed(each) for each in fields["layers"]]

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds its keys."""
        if spec.moe is not None and spec.moe.clamped_glu is not None:
            config["swiglu_alpha"], config["swiglu_limit"] = spec.moe.clamped_glu


FAMILY = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=RULES,
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "attention_bias": True,
        "sliding_window": 128,
        "rope_theta": 150000.0,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "router_aux_loss_coef": 0.001,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    renamed={"num_experts": "num_local_experts"},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    quirks=(
        EVERY_OTHER,
        LOCAL_EXPERTS,
        _Oddities(),
        _SCALING,
    ),
    rope=_SCALING.rope,
    writes_head_dim=True,
)
