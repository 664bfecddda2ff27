"""Tiny random models of the families that transformers has, made with its own classes.

A family of ours has an entry or more here; tests of conversion, models and training go through all.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

VOCAB = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
SOME_WINDOWS = {
    "use_sliding_window": True,
    "sliding_window": 7,
    "max_window_layers": 2,
    "layer_types": ["full_attention", "full_attention", "sliding_attention", "sliding_attention"],
}
NO_DROPOUT = {"attention_dropout": 0.0, "residual_dropout": 0.0}
NO_HIDDEN_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Entry:
    """One model.

    Args:
        kind: the name of its configuration's class without "Config", in transformers; that of the
            model lacks "Text" where this one has it.
        changes: of SIZES; a value of ... takes one out.
        tolerance: of losses beside transformers', relative.
        since: the first major version of transformers that can say it.
    """

    kind: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-6
    since: int = 4


MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.125,
    "logits_scaling": 2.0,
}


_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ZOO: dict[str, Entry] = {
    "exaone4": Entry("Exaone4", {"sliding_window": 7, "sliding_window_pattern": 2}),
    "exaone4, head_dim, tied, no windows": Entry(
        "Exaone4",
        {
            "head_dim": 10,
            "tie_word_embeddings": True,
            "sliding_window": None,
            "layer_types": ["full_attention"] * 4,
        },
    ),
    "exaone4, no rotary embedding": Entry("Exaone4", {"layer_types": ["full_attention"] * 4}),
    "mixtral": Entry("Mixtral", {"num_local_experts": 4}, 1e-5),
    "mixtral, window, tied": Entry(
        "Mixtral",
        {"num_local_experts": 3, "head_dim": 10, "sliding_window": 7, "tie_word_embeddings": True},
        1e-5,
    ),
    "mistral, head_dim": Entry("Mistral", {"head_dim": 16, "sliding_window": None}),
    "apertus": Entry("Apertus", {"rope_scaling": LLAMA3}),
    "apertus, tied, biases, a plain activation": Entry(
        "Apertus",
        {
            "hidden_act": "relu2",
            "tie_word_embeddings": True,
            "attention_bias": True,
            "rope_scaling": {"rope_type": "default"},
            "rope_theta": 500.0,
        },
    ),
    "arcee": Entry("Arcee", {"num_key_value_heads": None}),
    "arcee, tied, biases, yarn": Entry(
        "Arcee",
        {
            "tie_word_embeddings": True,
            "head_dim": 10,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_scaling": YARN,
        },
    ),
    "olmo2": Entry("Olmo2"),
    "olmo2, tied, biases": Entry("Olmo2", {"tie_word_embeddings": True, "attention_bias": True}),
    "olmo3": Entry("Olmo3", {"sliding_window": 7, "rope_theta": 500000.0}),
    "olmo3, tied, biases, yarn on full layers": Entry(
        "Olmo3",
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_theta": 500000.0,
            "rope_scaling": YARN,
        },
    ),
    "olmo3, another base in windows": Entry(
        "Olmo3",
        {
            "sliding_window": 7,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "rope_parameters": {
                "full_attention": {**PLAIN_ROPE, "rope_theta": 1000.0},
                "sliding_attention": PLAIN_ROPE,
            },
        },
        since=5,
    ),
    "olmo3, no windows": Entry(
        "Olmo3", {"rope_theta": 500000.0, "layer_types": ["full_attention"] * 4}
    ),
    "olmo3, all windows": Entry(
        "Olmo3",
        {
            "sliding_window": 7,
            "rope_theta": 500000.0,
            "layer_types": ["sliding_attention"] * 4,
        },
    ),
    "olmoe": Entry("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, 1e-5),
    "olmoe, renormalised, biases, tied": Entry(
        "Olmoe",
        {
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
        1e-5,
    ),
    "seed_oss": Entry("SeedOss", {"head_dim": 10, **NO_DROPOUT}),
    "seed_oss, tied, every bias": Entry(
        "SeedOss",
        {
            "head_dim": 16,
            "attention_out_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            **NO_DROPOUT,
        },
    ),
    "qwen2, some windows": Entry("Qwen2", SOME_WINDOWS),
    "qwen2_moe, some windows, renormalised": Entry(
        "Qwen2Moe",
        {
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "shared_expert_intermediate_size": 40,
            **_MOE,
            **SOME_WINDOWS,
        },
        1e-5,
        since=5,
    ),
    "qwen3": Entry("Qwen3", {"head_dim": 10}),
    "qwen3, tied, biases, windows": Entry(
        "Qwen3",
        {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True, **SOME_WINDOWS},
    ),
    "qwen3_moe": Entry(
        "Qwen3Moe", {"head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [1], **_MOE}, 1e-5
    ),
    "qwen3_moe, windows": Entry(
        "Qwen3Moe", {"use_sliding_window": True, "sliding_window": 7, **_MOE}, 1e-5
    ),
    "qwen3_moe, plain weights": Entry("Qwen3Moe", {"decoder_sparse_step": 2, **_MOE}, 1e-5),
    "gpt_neox": Entry(
        "GPTNeoX", {"hidden_size": 64, "num_key_value_heads": ..., **NO_HIDDEN_DROPOUT}
    ),
    "gpt_neox, one after the other, tied, no biases in attention": Entry(
        "GPTNeoX",
        {
            "hidden_size": 64,
            "num_key_value_heads": ...,
            "rotary_pct": 0.5,
            "rotary_emb_base": 500.0,
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_new",
            **NO_HIDDEN_DROPOUT,
        },
    ),
    "granite": Entry("Granite", MULTIPLIERS),
    "granite, tied, biases, head_dim": Entry(
        "Granite",
        {
            **MULTIPLIERS,
            "attention_multiplier": 10**-0.5,
            "logits_scaling": 0.7,
            "head_dim": 10,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "cohere": Entry("Cohere", {"logit_scale": 0.75}),
    "cohere, norms of queries and keys": Entry(
        "Cohere", {"logit_scale": 0.75, "use_qk_norm": True, "tie_word_embeddings": False}
    ),
    "stablelm": Entry("StableLm", {"hidden_size": 64, **NO_HIDDEN_DROPOUT}),
    "stablelm, one norm a layer, norms of queries and keys, biases, tied": Entry(
        "StableLm",
        {
            "partial_rotary_factor": 0.7,
            "qk_layernorm": True,
            "use_parallel_residual": True,
            "use_qkv_bias": True,
            "tie_word_embeddings": True,
            **NO_HIDDEN_DROPOUT,
        },
        since=5,  # version 4 loads such a model and cannot make one
    ),
    "cohere2": Entry("Cohere2", {"sliding_window": 7, "logit_scale": 0.25}),
    "cohere2, untied, biases, other layers": Entry(
        "Cohere2",
        {
            "sliding_window": 7,
            "logit_scale": 2.0,
            "layer_types": ["full_attention", *["sliding_attention"] * 3],
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "gemma": Entry("Gemma", {"head_dim": 16}),
    "gemma, untied, biases": Entry(
        "Gemma",
        {
            "head_dim": 10,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "num_key_value_heads": 8,
        },
    ),
    "gemma3_text": Entry(
        "Gemma3Text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gemma3_text, untied, biases, scaled, other bases": Entry(
        "Gemma3Text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 7,
            "layer_types": ["full_attention", *["sliding_attention"] * 3],
            "rope_theta": 500.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_local_base_freq": 100.0,
            "final_logit_softcapping": 5.0,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "gemma2": Entry("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 7}),
    "gemma2, untied, biases, other caps": Entry(
        "Gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 7,
            "layer_types": ["full_attention", *["sliding_attention"] * 3],
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.0, 4.0],
}
ZOO |= {
    "phi3": Entry("Phi3", {"hidden_size": 64, "sliding_window": 7}),
    "phi3, beyond its first context": Entry(
        "Phi3",
        {
            "hidden_size": 64,
            "partial_rotary_factor": 0.75,
            "rope_scaling": LONGROPE,
            "original_max_position_embeddings": 16,
            "tie_word_embeddings": True,
        },
        # In fp32 transformers' own third norm is 1.7e-6 from what it is in fp64, and ours 0.6e-6.
        2e-6,
    ),
    "phi3, within its first context": Entry(
        "Phi3",
        {
            "hidden_size": 64,
            "partial_rotary_factor": 0.75,
            "rope_scaling": LONGROPE,
            "original_max_position_embeddings": 64,
        },
    ),
}

_MLA = {
    "num_key_value_heads": 8,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10,
    "v_head_dim": 12,
}
_GROUPED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 32,
}
_DEEPSEEK = {**_MLA, **_GROUPED, "initializer_range": 0.15}
ZOO["deepseek_v3"] = Entry("DeepseekV3", _DEEPSEEK, 1e-5)
ZOO["deepseek_v3, no q rank, YaRN, biases"] = Entry(
    "DeepseekV3",
    {
        **_DEEPSEEK,
        "q_lora_rank": None,
        "attention_bias": True,
        "rope_scaling": _YARN,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "n_shared_experts": 2,
    },
    1e-5,
)
_HALF = {"head_dim": 16}
_OTHERWISE = {
    "head_dim": 10,
    "partial_rotary_factor": 0.6,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
ZOO |= {
    "glm": Entry("Glm", _HALF),
    "glm, tied, no biases, another part": Entry("Glm", _OTHERWISE),
    "glm4": Entry("Glm4", _HALF),
    "glm4, tied, no biases, another part": Entry("Glm4", _OTHERWISE),
    "ernie4_5": Entry("Ernie4_5", _HALF),
    "ernie4_5, untied, biases": Entry(
        "Ernie4_5", {"head_dim": 10, "tie_word_embeddings": False, "use_bias": True}
    ),
    "glm4_moe": Entry(
        "Glm4Moe", {**_GROUPED, **_HALF, "attention_bias": True, "use_qk_norm": True}, 1e-5
    ),
    "glm4_moe, tied, no groups, plain weights": Entry(
        "Glm4Moe",
        {
            **_GROUPED,
            "head_dim": 10,
            "partial_rotary_factor": 0.6,
            "tie_word_embeddings": True,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "n_shared_experts": 2,
            "first_k_dense_replace": 2,
        },
        1e-5,
    ),
}

_GPT_OSS = {
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 24,
    "sliding_window": 7,
}
ZOO["gpt_oss"] = Entry("GptOss", _GPT_OSS, 1e-5)
ZOO["gpt_oss, no scaling, no windows"] = Entry(
    "GptOss",
    {**_GPT_OSS, "rope_scaling": PLAIN_ROPE, "layer_types": ["full_attention"] * 4},
    1e-5,
)
ZOO["gpt_oss, windows on all layers"] = Entry(
    "GptOss", {**_GPT_OSS, "layer_types": ["sliding_attention"] * 4}, 1e-5
)
ZOO["gpt_oss, a lower limit"] = Entry("GptOss", {**_GPT_OSS, "swiglu_limit": 1.5}, 1e-5, since=5)


def _say_as_version_4_can(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            # It leaves groups out by a score of 0, which is lowest where no score is below it.
            tensor.abs_()
        if ".act_fn.alpha" in name:
            tensor.copy_(tensor.bfloat16())  # the dtype in which it has them


def cases() -> list[Any]:
    """The names, for parametrize: what is marked `versions` has one entry of each family."""
    first = {entry.kind: name for name, entry in reversed(ZOO.items())}.values()
    return [
        pytest.param(name, marks=[pytest.mark.versions] if name in first else []) for name in ZOO
    ]


def save(
    name: str,
    root: Path,
    dtype: torch.dtype = torch.float32,
    *,
    correction_bias: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    """The entry's model with norms and biases that show. Skips where transformers lacks it.

    Released models have a `correction_bias` of fp32 in any dtype.
    """
    import transformers

    entry = ZOO[name]
    config_class = getattr(transformers, f"{entry.kind}Config", None)
    of_model = entry.kind.removesuffix("Text")
    model_class = getattr(transformers, f"{of_model}ForCausalLM", None)
    version = int(transformers.__version__.split(".")[0])
    if config_class is None or model_class is None or version < entry.since:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    # A configuration changes what it is given.
    sizes = copy.deepcopy({**SIZES, **entry.changes, **changes})
    sizes = {key: value for key, value in sizes.items() if value is not ...}
    model = model_class(config_class(**sizes)).to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.to(correction_bias)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor.add_(0.3 * torch.randn_like(tensor))
        if version == 4:
            _say_as_version_4_can(model.state_dict())
    model.save_pretrained(root)
    return root
