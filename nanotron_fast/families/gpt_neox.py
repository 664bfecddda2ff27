"""GPT-NeoX and Pythia: LayerNorms, attention and MLP side by side, q, k and v in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from nanotron_fast.families.decoder import BLOCK, DEFAULTS, EMBEDDING, layer_norm
from nanotron_fast.families.family import Family
from nanotron_fast.families.fused_by_head import FusedByHead
from nanotron_fast.families.quirk import Quirk
from nanotron_fast.families.rotary import PartialRotary, rope_of_a_part
from nanotron_fast.families.rules import Copy, Rule
from nanotron_fast.formats.fields import Fields
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG
from nanotron_fast.model.spec import ModelSpec

_LAYER = "gpt_neox.layers.{layer}."
_RESIDUAL, _SHARE, _BASE = "use_parallel_residual", "rotary_pct", "rotary_emb_base"
_DROPOUTS = ("attention_dropout", "hidden_dropout", "classifier_dropout")


_matrix = partial(Copy, rows="vocab", columns="hidden", split="rows")
_square = partial(Copy, rows="hidden", columns=("heads", "head_dim"), split="columns")
_HEAD, _IN = "embed_out.weight", "gpt_neox.embed_in.weight"
_UP, _DOWN = f"{_LAYER}mlp.dense_h_to_4h", f"{_LAYER}mlp.dense_4h_to_h"
RULES: tuple[Rule, ...] = (
    _matrix(_IN, EMBEDDING, block="embedding"),
    _matrix(
        _HEAD, "model.lm_head.pp_block.weight", block="head", when="untied", alias="lm_head.weight"
    ),
    *layer_norm("gpt_neox.final_layer_norm", "model.final_layer_norm.pp_block", "norm"),
    *layer_norm(f"{_LAYER}input_layernorm", f"{BLOCK}input_layernorm"),
    FusedByHead(
        f"{_LAYER}attention.query_key_value.weight",
        f"{BLOCK}attn.qkv_proj.weight",
        columns="hidden",
    ),
    FusedByHead(
        f"{_LAYER}attention.query_key_value.bias", f"{BLOCK}attn.qkv_proj.bias", when="qkv_bias"
    ),
    _square(f"{_LAYER}attention.dense.weight", f"{BLOCK}attn.o_proj.weight"),
    Copy(
        f"{_LAYER}attention.dense.bias",
        f"{BLOCK}attn.o_proj.bias",
        rows="hidden",
        when="output_bias",
    ),
    *layer_norm(f"{_LAYER}post_attention_layernorm", f"{BLOCK}post_attention_layernorm"),
    Copy(
        f"{_UP}.weight",
        f"{BLOCK}mlp.gate_up_proj.weight",
        rows="intermediate",
        columns="hidden",
        split="rows",
    ),
    Copy(f"{_UP}.bias", f"{BLOCK}mlp.gate_up_proj.bias", rows="intermediate", split="rows"),
    Copy(
        f"{_DOWN}.weight",
        f"{BLOCK}mlp.down_proj.weight",
        rows="hidden",
        columns="intermediate",
        split="columns",
    ),
    Copy(f"{_DOWN}.bias", f"{BLOCK}mlp.down_proj.bias", rows="hidden"),
)


@dataclass(frozen=True, slots=True)
class Beside(Quirk):
    """`use_parallel_residual`, and rotary embeddings under the names of such a config.json."""

    keys: frozenset[str] = frozenset({_RESIDUAL, _SHARE, _BASE})
    expresses: frozenset[str] = frozenset({"norm_places"})
    aliases: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"rope_theta": (_BASE,), "partial_rotary_factor": (_SHARE,)}
    )

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Says where layers have their norms. Raises ConfigError."""
        if reader.flag(_RESIDUAL):
            fields["layers"] = [replace(each, norms="beside") for each in fields["layers"]]

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds its keys in place of the usual ones."""
        config[_RESIDUAL] = spec.norm_places == ("beside",)
        config[_BASE] = config.pop("rope_theta")
        config[_SHARE] = config.pop("partial_rotary_factor")


FAMILY = Family(
    name="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=RULES,
    defaults={
        **DEFAULTS,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "attention_bias": True,
        "partial_rotary_factor": 0.25,
        _RESIDUAL: True,
        **dict.fromkeys(_DROPOUTS, 0.0),
        "classifier_dropout": 0.1,
    },
    # Its class has as many key-value heads as others, whatever config.json says.
    keys={"norm_eps": "layer_norm_eps", "num_kv_heads": "num_attention_heads"},
    renamed={_BASE: "rope_theta", _SHARE: "partial_rotary_factor"},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias=True,
    norm="layer_norm",
    has_gated_mlp=False,
    rope=rope_of_a_part,
    quirks=(PartialRotary(), Beside()),
    buffers=("gpt_neox.layers.*.attention.bias",),
    extras=_DROPOUTS,
)
