"""What families with experts share: rules of their tables, and how config.json says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.families.decoder import BLOCK, LAYER
from nanotron_fast.families.quirk import Quirk
from nanotron_fast.families.rules import Copy, Rule, StackExperts
from nanotron_fast.formats.fields import MAX_COUNT, Fields
from nanotron_fast.model.spec import Experts, ModelSpec

# Other names under which some classes keep what a mixture of experts has.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("moe_topk", "moe_k"),
}


def experts(
    hf: str = "mlp",
    *,
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    newer: str | None = None,
) -> tuple[Rule, ...]:
    """The router, and all experts in two parameters.

    `hf` is the block's name in Hugging Face, and `newer` the one that transformers 5 has in memory,
    where it is another.
    """
    each, all_of_them = f"{LAYER}{hf}.experts.{{expert}}", f"{LAYER}{newer or hf}.experts"
    return (
        Copy(
            f"{LAYER}{hf}.gate.weight",
            f"{BLOCK}mlp.router.weight",
            rows="experts",
            columns="hidden",
            layers="moe",
            is_fp32=True,
            alias=None if newer is None else f"{LAYER}{newer}.gate.weight",
        ),
        StackExperts(
            (f"{each}.{gate}.weight", f"{each}.{up}.weight"),
            f"{all_of_them}.gate_up_proj",
            f"{BLOCK}mlp.experts.merged_gate_up_proj",
            rows="moe_intermediate",
            columns="hidden",
        ),
        StackExperts(
            (f"{each}.{down}.weight",),
            f"{all_of_them}.down_proj",
            f"{BLOCK}mlp.experts.merged_down_proj",
            rows="hidden",
            columns="moe_intermediate",
        ),
    )


@dataclass(frozen=True, slots=True)
class ExpertLayers(Quirk):
    """Experts on every layer, or on every decoder_sparse_step-th but those of mlp_only_layers.

    Args:
        count, top_k, size: the keys of how many experts there are, how many a token goes to, and of
            an expert's intermediate size.
        shared_size: the key of the shared expert's, where there is one.
        renormalises: whether the chosen weights are made to sum to 1, or the key that says so.
        has_dense_layers: the keys decoder_sparse_step and mlp_only_layers are read.
    """

    count: str = "num_experts"
    top_k: str = "num_experts_per_tok"
    size: str = "moe_intermediate_size"
    shared_size: str | None = None
    renormalises: bool | str = "norm_topk_prob"
    has_dense_layers: bool = True
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _ALIASES)

    @property
    def keys(self) -> frozenset[str]:
        """See Quirk."""
        return frozenset({self.count, *self.aliases.get(self.count, ())})

    @property
    def expresses(self) -> frozenset[str]:
        """See Quirk."""
        shared = {"shared_expert"} if self.shared_size is not None else set[str]()
        return frozenset({"moe", *shared})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Gives layers their experts. Raises ConfigError, UnsupportedModelError."""
        num_experts = reader.positive(self.count, MAX_COUNT)
        top_k = reader.positive(self.top_k)
        if top_k > num_experts:
            raise ConfigError(
                f"config.json: {self.top_k} is {top_k}, and {self.count} is {num_experts}: "
                "no token can be sent to more experts than there are"
            )
        renormalises = self.renormalises
        experts = Experts(
            num_experts=num_experts,
            top_k=top_k,
            intermediate_size=reader.positive(self.size),
            shared_intermediate_size=reader.positive(self.shared_size) if self.shared_size else 0,
            has_shared_expert=self.shared_size is not None,
            is_renormalised=renormalises
            if isinstance(renormalises, bool)
            else reader.flag(renormalises),
        )
        fields["router_aux_loss_coef"] = reader.number("router_aux_loss_coef")
        step, dense = 1, set[int]()
        if self.has_dense_layers:
            step = reader.positive("decoder_sparse_step")
            dense = set(reader.indices("mlp_only_layers"))
        fields["layers"] = layers = [
            each if layer in dense or (layer + 1) % step else replace(each, mlp=experts)
            for layer, each in enumerate(fields["layers"])
        ]
        if not any(each.mlp is experts for each in layers):
            raise UnsupportedModelError(
                f"config.json: by mlp_only_layers {sorted(dense)} and decoder_sparse_step {step} "
                f"none of {len(layers)} layers has experts: it computes as a model of a family "
                "without them, whose model_type it should have"
            )

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds its keys, where there are experts."""
        moe = spec.moe
        if moe is None:
            return
        config[self.count] = moe.num_experts
        config[self.top_k] = moe.top_k
        config[self.size] = moe.intermediate_size
        if self.shared_size is not None:
            config[self.shared_size] = moe.shared_intermediate_size
        if self.has_dense_layers:
            config["decoder_sparse_step"] = 1
            config["mlp_only_layers"] = [
                layer for layer in range(spec.num_layers) if layer not in spec.moe_layers
            ]
        if isinstance(self.renormalises, str):
            config[self.renormalises] = moe.is_renormalised
        config["router_aux_loss_coef"] = spec.router_aux_loss_coef


# On every layer, under the names that Mixtral gave the keys.
LOCAL_EXPERTS = ExpertLayers(
    count="num_local_experts",
    size="intermediate_size",
    renormalises=True,
    has_dense_layers=False,
    aliases={"num_local_experts": ("num_experts",)},
)
