"""Starcoder2Config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nanotron_fast.errors import UnsupportedModelError
from nanotron_fast.formats.fields import Fields
from nanotron_fast.formats.nanotron.classes.base import FILE, StockClass, layer_cost, register
from nanotron_fast.model.spec import Dense, Layer, ModelSpec

_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_kv_heads",
    "norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
    "sliding_window": "sliding_window_size",
}
_FIELDS: dict[str, Any] = {
    "activation_function": "gelu_pytorch_tanh",
    "attention_softmax_in_fp32": True,
    "attn_pdrop": 0.1,
    "bos_token_id": 49152,
    "embd_pdrop": 0.1,
    "eos_token_id": 49152,
    "global_attn_layers": [],
    "grouped_query": False,
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": None,
    "is_starcoder2_config": True,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 4096,
    "multi_query": False,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_kv_heads": None,
    "resid_pdrop": 0.1,
    "rope_theta": 10000,
    "scale_attention_softmax_in_fp32": True,
    "scale_attn_weights": True,
    "sliding_window_size": None,
    "use_position_embeddings": False,
    "use_rotary_embeddings": True,
    "vocab_size": 49280,
    "_attn_implementation": "flash_attention_2",
}
# What Hugging Face's class does without asking.
_FIXED = {
    "use_rotary_embeddings": True,
    "use_position_embeddings": False,
    "scale_attn_weights": True,
    "global_attn_layers": [],
}


def _write(config: dict[str, Any], spec: ModelSpec, rope_interleaved: bool) -> None:
    # An integer in the class, and Nanotron's YAML reader is strict about it.
    if spec.rope_theta == int(spec.rope_theta):
        config["rope_theta"] = int(spec.rope_theta)
    # The stock class never reads it, and every Starcoder2 checkpoint has the default.
    config["initializer_range"] = _FIELDS["initializer_range"]
    config["grouped_query"] = True
    config["global_attn_layers"] = []
    config["sliding_window_size"] = spec.sliding_window
    config["attn_pdrop"] = spec.extras.get("attention_dropout", 0.0)
    config["embd_pdrop"] = spec.extras.get("embedding_dropout", 0.0)
    config["resid_pdrop"] = spec.extras.get("residual_dropout", 0.0)


def _read(full: Fields, fields: dict[str, Any], moe_sizes: Mapping[str, Any]) -> ModelSpec:
    num_layers = fields.pop("num_layers")
    if not full.flag("grouped_query"):
        raise UnsupportedModelError(
            f"{FILE}: grouped_query is false: such a Starcoder2 keeps query and key-value "
            "weights apart, and only grouped_query models are converted"
        )
    for name, value in _FIXED.items():
        if full.get(name) != value:
            raise UnsupportedModelError(
                f"{FILE}: {name} is {full.get(name)!r}: Hugging Face's Starcoder2 "
                f"computes as if it were {value!r}"
            )
    attention = fields.pop("attention")
    layer = Layer(
        replace(
            attention,
            window=full.positive_or_none("sliding_window_size"),
            has_qkv_bias=True,
            has_output_bias=True,
        ),
        Dense(fields["intermediate_size"], has_bias=True, is_gated=False),
    )
    return ModelSpec(
        **fields,
        layers=(layer,) * num_layers,
        tie_word_embeddings=True,
        norm="layer_norm",
        extras={
            "attention_dropout": full.number("attn_pdrop"),
            "embedding_dropout": full.number("embd_pdrop"),
            "residual_dropout": full.number("resid_pdrop"),
        },
    )


STARCODER2_CONFIG = register(
    StockClass(
        name="Starcoder2Config",
        option="starcoder2",
        marker="is_starcoder2_config",
        fields=_FIELDS,
        fields_1_2=tuple(name for name in _FIELDS if name != "_attn_implementation"),
        keys=_KEYS,
        holds=frozenset(
            {"layer_norm", "plain_mlp", "qkv_bias", "output_bias", "mlp_bias", "sliding_window"}
        ),
        write_rest=_write,
        read_rest=_read,
        layer_cost=layer_cost(mlp_matrices=2),
        can_rotate_neighbours=False,
        # It asks for num_key_value_heads, which the class lacks.
        starts_from_yaml=False,
    )
)
