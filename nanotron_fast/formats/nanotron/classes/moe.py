"""Nanotron's MoEConfig: the `moe_config` of a Qwen2Config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanotron_fast.errors import ConfigError
from nanotron_fast.formats.fields import MAX_COUNT, Fields
from nanotron_fast.model.spec import Experts, ModelSpec

MOE_FIELDS = (
    "num_experts",
    "top_k",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "router_aux_loss_coef",
    "layers",
    "enable_shared_expert",
    "token_dispatcher_type",
)


def write_moe(spec: ModelSpec) -> dict[str, Any] | None:
    """Its fields; None for a model without experts."""
    moe = spec.moe
    if moe is None:
        return None
    return {
        "num_experts": moe.num_experts,
        "top_k": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "shared_expert_intermediate_size": moe.shared_intermediate_size,
        "router_aux_loss_coef": spec.router_aux_loss_coef,
        "layers": list(spec.moe_layers),
        "enable_shared_expert": moe.has_shared_expert,
        "token_dispatcher_type": "alltoall",
    }


def read_moe(
    config: Mapping[str, Any] | None, num_layers: int, sizes: Mapping[str, Any]
) -> tuple[Experts, tuple[int, ...], float] | None:
    """The experts, the layers that have them, and router_aux_loss_coef. Raises ConfigError.

    Tensors may show `sizes` that the configuration lacks.
    """
    if config is None:
        return None
    # Defaults of Nanotron's MoEConfig; those of its branches lack some fields.
    defaults = {
        "layers": [-1],
        "enable_shared_expert": False,
        "router_aux_loss_coef": 0.01,
        **sizes,
    }
    moe = Fields("model_config.json: moe_config", config, defaults)
    has_shared_expert = moe.flag("enable_shared_expert")
    layers = moe.indices("layers")
    if layers != [-1] and not set(layers) <= set(range(num_layers)):
        raise moe.error("layers", f"a list of layers, of which there are {num_layers}")
    shared_size = "shared_expert_intermediate_size"
    num_experts, top_k = moe.positive("num_experts", MAX_COUNT), moe.positive("top_k")
    if top_k > num_experts:
        raise ConfigError(
            f"model_config.json: moe_config: top_k is {top_k}, and num_experts is {num_experts}: "
            "no token can be sent to more experts than there are"
        )
    experts = Experts(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=moe.positive("moe_intermediate_size"),
        shared_intermediate_size=moe.positive(shared_size) if has_shared_expert else 0,
        has_shared_expert=has_shared_expert,
    )
    where = tuple(range(num_layers)) if layers == [-1] else tuple(layers)
    return experts, where, moe.number("router_aux_loss_coef")
