"""Experts as DeepSeek-V3 has them, and models after it: tensors, and config.json's words.

A router's scores are sigmoids; a correction bias, which training moves by the experts' load and not
by a gradient, decides with them who is chosen, from the best groups alone; an expert without a gate
is shared; the first layers are dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.families.decoder import BLOCK, LAYER, mlp
from nanotron_fast.families.moe import experts
from nanotron_fast.families.quirk import Quirk
from nanotron_fast.families.rules import Copy, Rule
from nanotron_fast.formats.fields import MAX_COUNT, Fields
from nanotron_fast.model.spec import Experts, ModelSpec

RULES: tuple[Rule, ...] = (
    *experts(),
    Copy(
        f"{LAYER}mlp.gate.e_score_correction_bias",
        f"{BLOCK}mlp.router.correction_bias",
        rows="experts",
        layers="moe",
        when="correction_bias",
        is_fp32=True,
        is_frozen=True,
    ),
    *mlp(
        "mlp.shared_experts",
        "mlp.shared_expert",
        "shared_intermediate",
        layers="moe",
        when="shared_expert",
    ),
)
# What configurations of such models say beside, and transformers does not read.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
}
PREDICTION_LAYERS = "num_nextn_predict_layers"
DEFAULTS: Mapping[str, Any] = {
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
}


@dataclass(frozen=True, slots=True)
class GroupedExperts(Quirk):
    """Experts on every layer but the first `first_k_dense_replace`."""

    keys: frozenset[str] = frozenset(
        {"n_routed_experts", "num_local_experts", "n_shared_experts", "routed_scaling_factor"}
    )
    expresses: frozenset[str] = frozenset({"moe", "shared_expert"})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Gives layers their experts. Raises ConfigError, UnsupportedModelError."""
        for key, values in _ONLY.items():
            value = reader.config.get(key)
            if value is not None and value not in values:
                raise UnsupportedModelError(
                    f"config.json: {key} is {value!r}, and transformers computes {values[0]!r}"
                )
        num_experts = reader.positive("n_routed_experts", MAX_COUNT)
        num_groups, top_k = reader.positive("n_group"), reader.positive("num_experts_per_tok")
        top_k_groups = reader.positive("topk_group")
        if num_experts % num_groups or top_k_groups > num_groups:
            raise ConfigError(
                f"config.json: n_group is {num_groups} and topk_group {top_k_groups}, for "
                f"{num_experts} experts"
            )
        if top_k > top_k_groups * (num_experts // num_groups):
            raise ConfigError(
                f"config.json: num_experts_per_tok is {top_k}, and {top_k_groups} groups of "
                f"{num_experts // num_groups} have fewer"
            )
        size = reader.positive("moe_intermediate_size")
        experts = Experts(
            num_experts=num_experts,
            top_k=top_k,
            intermediate_size=size,
            shared_intermediate_size=size * reader.positive("n_shared_experts"),
            has_shared_expert=True,
            has_shared_gate=False,
            scoring="sigmoid",
            is_renormalised=reader.flag("norm_topk_prob"),
            scale=reader.number("routed_scaling_factor"),
            has_correction_bias=True,
            num_groups=num_groups,
            top_k_groups=top_k_groups,
        )
        first = reader.integer("first_k_dense_replace")
        if not 0 <= first < len(fields["layers"]):
            raise ConfigError(
                f"config.json: first_k_dense_replace is {first}, and none of "
                f"{len(fields['layers'])} layers has experts"
            )
        fields["layers"] = [
            each if layer < first else replace(each, mlp=experts)
            for layer, each in enumerate(fields["layers"])
        ]

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds its keys, where there are experts."""
        moe = spec.moe
        if moe is None:
            return
        config["n_routed_experts"] = moe.num_experts
        config["num_experts_per_tok"] = moe.top_k
        config["moe_intermediate_size"] = moe.intermediate_size
        config["n_shared_experts"] = moe.shared_intermediate_size // moe.intermediate_size
        config["n_group"], config["topk_group"] = moe.num_groups, moe.top_k_groups
        config["norm_topk_prob"] = moe.is_renormalised
        config["routed_scaling_factor"] = moe.scale
        config["first_k_dense_replace"] = spec.moe_layers[0]
