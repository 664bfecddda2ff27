"""StableLM: LayerNorms; a quarter of each head turns; in some attention and MLP share a norm."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nanotron_fast.families.decoder import (
    BLOCK,
    DEFAULTS,
    EMBEDDINGS,
    LAYER,
    PROJECTIONS,
    mlp,
    norms,
)
from nanotron_fast.families.family import Family
from nanotron_fast.families.qk_norms import QkNorm, norms_of_heads
from nanotron_fast.families.quirk import Quirk
from nanotron_fast.families.rotary import PartialRotary, rope_of_a_part
from nanotron_fast.families.rules import Copy, Rule
from nanotron_fast.formats.fields import Fields
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG
from nanotron_fast.model.spec import ModelSpec

_KEY = "use_parallel_residual"
_DROPOUTS = ("hidden_dropout", "attention_dropout")


@dataclass(frozen=True, slots=True)
class ParallelResidual(Quirk):
    """`use_parallel_residual`: attention and MLP work side by side on one norm."""

    keys: frozenset[str] = frozenset({_KEY})
    expresses: frozenset[str] = frozenset({"norm_places"})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Says it of the layers. Raises ConfigError."""
        if reader.flag(_KEY):
            fields["layers"] = [replace(each, norms="parallel") for each in fields["layers"]]

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds its key."""
        config[_KEY] = spec.norm_places == ("parallel",)


def _mlp_norm(kind: str) -> Rule:
    """That of a layer whose MLP has one."""
    name = f"post_attention_layernorm.{kind}"
    return Copy(f"{LAYER}{name}", f"{BLOCK}{name}", rows="hidden", when="mlp_norm")


FAMILY = Family(
    name="stablelm",
    architecture="StableLmForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=(
        *EMBEDDINGS,
        Copy(
            "model.norm.bias",
            "model.final_layer_norm.pp_block.bias",
            rows="hidden",
            block="norm",
        ),
        *norms("input_layernorm"),
        *norms("input_layernorm", kind="bias"),
        *PROJECTIONS,
        *norms_of_heads(
            "q_layernorm.norms.{head}.weight",
            "k_layernorm.norms.{head}.weight",
        ),
        _mlp_norm("weight"),
        _mlp_norm("bias"),
        *mlp("mlp", "mlp", "intermediate"),
    ),
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "partial_rotary_factor": 0.25,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        _KEY: False,
        **dict.fromkeys(_DROPOUTS, 0.0),
    },
    keys={"norm_eps": "layer_norm_eps"},
    qkv_bias="use_qkv_bias",
    norm="layer_norm",
    rope=rope_of_a_part,
    quirks=(PartialRotary(), QkNorm("qk_layernorm", "apart"), ParallelResidual()),
    extras=_DROPOUTS,
)
