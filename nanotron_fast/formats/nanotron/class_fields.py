"""The fields of Nanotron's model configuration classes, in their order, with their defaults.

Source: nanotron/config/models_config.py at 2411b022 (checkpoint version 1.5); PyPI's 0.4 (version
1.2) has a subset. A stock class fails on a key it does not know, so exactly these are written.
"""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
}
_ATTENTION_DEFAULT = "flash_attention_2"

FIELDS: dict[str, dict[str, Any]] = {
    "LlamaConfig": {
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
        "_attn_implementation": _ATTENTION_DEFAULT,
        "z_loss_enabled": False,
        "z_loss_coefficient": 0.0001,
    },
    "Qwen2Config": {
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
        "_attn_implementation": _ATTENTION_DEFAULT,
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
    },
    "Starcoder2Config": {
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
        "_attn_implementation": _ATTENTION_DEFAULT,
    },
}

# What no class of Nanotron's has, and --target nanotron-fast writes after its fields where a model
# differs from what they can say. Stock Nanotron stops at them, as it should: it would compute
# something else.
EXTENSION_FIELDS = ("head_dim", "attention_output_bias", "mlp_bias")

# What PyPI's 0.4 does not know.
_SINCE_1_5 = {
    "attention_bias",
    "rope_theta",
    "rope_interleaved",
    "_attn_implementation",
    "z_loss_enabled",
    "z_loss_coefficient",
}
FIELDS_1_2 = {
    "LlamaConfig": [name for name in FIELDS["LlamaConfig"] if name not in _SINCE_1_5],
    "Starcoder2Config": [
        name for name in FIELDS["Starcoder2Config"] if name != "_attn_implementation"
    ],
}
