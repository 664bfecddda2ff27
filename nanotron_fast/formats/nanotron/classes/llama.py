"""LlamaConfig and Qwen2Config, whose parameters have the same names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nanotron_fast.errors import UnsupportedModelError
from nanotron_fast.formats.fields import Fields
from nanotron_fast.formats.nanotron.classes.base import StockClass, layer_cost, register
from nanotron_fast.formats.nanotron.classes.moe import read_moe, write_moe
from nanotron_fast.model.spec import Dense, Layer, ModelSpec

_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
}
_COMMON: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
}
# What PyPI's 0.4 does not know.
_SINCE_1_5 = {
    "attention_bias",
    "rope_theta",
    "rope_interleaved",
    "_attn_implementation",
    "z_loss_enabled",
    "z_loss_coefficient",
}
_LLAMA_FIELDS: dict[str, Any] = {
    **_COMMON,
    "is_llama_config": True,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "attention_bias": False,
    "num_key_value_heads": None,
    "pad_token_id": None,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "rope_interleaved": False,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 32000,
    "_attn_implementation": "flash_attention_2",
    "z_loss_enabled": False,
    "z_loss_coefficient": 0.0001,
}
_QWEN2_FIELDS: dict[str, Any] = {
    **_COMMON,
    "is_qwen2_config": True,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": None,
    "pad_token_id": None,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "rope_interleaved": False,
    "rope_seq_len_interpolation_factor": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 32000,
    "_attn_implementation": "flash_attention_2",
    "flex_attention_mask": None,
    "attention_bias": False,
    "sliding_window_size": None,
    "z_loss_enabled": False,
    "z_loss_coefficient": 0.0001,
    "no_rope_layer": None,
    "_fused_rotary_emb": True,
    "_fused_rms_norm": True,
    "_use_qkv_packed": True,
    "_use_doc_masking": False,
    "log_attn_probs": True,
    "ring_attn_heads_k_stride": None,
    "moe_config": None,
}


def _write_llama(config: dict[str, Any], spec: ModelSpec, rope_interleaved: bool) -> None:
    config["attention_bias"] = spec.has_qkv_bias
    config["tie_word_embeddings"] = spec.tie_word_embeddings
    config["use_cache"] = spec.use_cache
    config["rope_interleaved"] = rope_interleaved
    config["rope_scaling"] = None if spec.rope_scaling is None else dict(spec.rope_scaling)
    pretraining_tp = spec.extras.get("pretraining_tp")
    config["pretraining_tp"] = 1 if pretraining_tp is None else pretraining_tp


def _write_qwen2(config: dict[str, Any], spec: ModelSpec, rope_interleaved: bool) -> None:
    _write_llama(config, spec, rope_interleaved)
    # Of the layers that rotate: the class gives the others none.
    windows = {each.attention.window for each in spec.layers if each.attention.rotary is not None}
    config["sliding_window_size"] = windows.pop() if len(windows) == 1 else None
    config["no_rope_layer"] = spec.no_rope_interval
    config["moe_config"] = write_moe(spec)


def _read(full: Fields, fields: dict[str, Any], moe_sizes: Mapping[str, Any]) -> ModelSpec:
    factor = full.get("rope_seq_len_interpolation_factor")
    if factor not in (None, 1.0):
        raise UnsupportedModelError(
            f"model_config.json: rope_seq_len_interpolation_factor is {factor!r}: Nanotron divides "
            "positions by it, and the way to Hugging Face has no place for that"
        )
    num_layers, attention = fields.pop("num_layers"), fields.pop("attention")
    attention = replace(
        attention,
        window=full.positive_or_none("sliding_window_size"),
        has_qkv_bias=full.flag("attention_bias"),
    )
    dense = Dense(fields["intermediate_size"])
    interval = full.positive_or_none("no_rope_layer")
    moe = read_moe(full.mapping("moe_config"), num_layers, moe_sizes)
    experts, moe_layers, router_aux_loss_coef = moe or (None, (), None)
    layers = (
        Layer(
            replace(attention, rotary=None)
            if interval is not None and (layer + 1) % interval == 0
            else attention,
            experts if experts is not None and layer in moe_layers else dense,
        )
        for layer in range(num_layers)
    )
    return ModelSpec(
        **fields,
        layers=tuple(layers),
        router_aux_loss_coef=router_aux_loss_coef,
        pad_token_id=full.token_ids("pad_token_id"),
        tie_word_embeddings=full.flag("tie_word_embeddings"),
        use_cache=full.flag("use_cache"),
        extras={"pretraining_tp": full.integer("pretraining_tp")},
    )


LLAMA_CONFIG = register(
    StockClass(
        name="LlamaConfig",
        option="llama",
        marker="is_llama_config",
        fields=_LLAMA_FIELDS,
        fields_1_2=tuple(name for name in _LLAMA_FIELDS if name not in _SINCE_1_5),
        keys=_KEYS,
        holds=frozenset({"rms_norm", "gated_mlp", "no_bias", "untied"}),
        drop_in_holds=frozenset({"rope_scaling"}),
        write_rest=_write_llama,
        read_rest=_read,
        layer_cost=layer_cost(mlp_matrices=3),
        casts_to_fp32=True,
        ignores_attention_bias=True,
        rotates_neighbours_in_1_2=True,
        pp_warning={
            "1.5": "Nanotron's trainer crashes after the first step of a Llama at pp > 1 (here "
            "pp={pp}), where stages without a loss log it; nanotron-fast train does not"
        },
    )
)
QWEN2_CONFIG = register(
    StockClass(
        name="Qwen2Config",
        option="qwen2",
        marker="is_qwen2_config",
        fields=_QWEN2_FIELDS,
        fields_1_2=None,
        keys=_KEYS,
        holds=frozenset(
            {
                "rms_norm",
                "gated_mlp",
                "no_bias",
                "untied",
                "qkv_bias",
                "sliding_window",
                "no_rope_layers",
                "moe",
            }
        ),
        drop_in_holds=frozenset({"rope_scaling"}),
        write_rest=_write_qwen2,
        read_rest=_read,
        layer_cost=layer_cost(mlp_matrices=3),
        has_norms_first=True,
        pp_warning={
            "1.5": "Nanotron's Qwen2 model crashes in its forward pass at pp > 1 (here "
            "pp={pp}); nanotron-fast train does not"
        },
    )
)
