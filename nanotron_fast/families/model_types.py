"""What is known of model types that have no table of their own, by transformers 5's code for them.

Two kinds: those that Nanotron cannot compute, each with why; and those that compute as a Llama does
once some of their keys are neutral, so that `--family` can convert them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nanotron_fast.formats.fields import is_number
from nanotron_fast.model.spec import ModelSpec

# What to say of the second kind.
AS_LLAMA = (
    "it computes as a llama where its keys are neutral; --family llama, mistral or qwen2 converts "
    "it where they are"
)
_NEIGHBOURS = "its rotary embedding turns neighbours in a head, where Nanotron's tables turn halves"
_QK_NORM = "its queries and keys are normalised (qk-norm), which Nanotron does not do"
_LAYER_NORM = "its norms are LayerNorm, and Nanotron's have neither mean nor bias"
_POSITIONS = "its positions are learned embeddings, and Nanotron's are rotary"
_ALIBI = "its positions are slopes in the attention (ALiBi), and Nanotron's are rotary"
_PARALLEL = "attention and MLP work side by side on one norm, and in Nanotron one after the other"
_ZERO_CENTRED = "its norms are zero-centred and its embeddings scaled, which Nanotron does not do"
_PARTIAL = "its rotary embedding is partial, which Nanotron does not do"
_MLA = "its keys and values are compressed (multi-head latent attention), which Nanotron lacks"
_RENORMALISED = "it renormalises the weights of the chosen experts, which Nanotron does not do"
_RECURRENT = "some of its layers are recurrent (state space or linear attention), not attention"
_MIXED_WINDOWS = "some of its layers have a sliding window, and Nanotron has one on all or on none"
_MULTIMODAL = "it is a multimodal model around a text model; only text models are converted"
_ENCODER = "it is an encoder, and Nanotron trains decoders of text"
_ENCODER_DECODER = "it has an encoder and a decoder, and Nanotron trains decoders alone"
_NOT_TEXT = "it is not a model of text"
_FUSED = "its q, k and v are stored in one tensor of its own layout, and there is no table for it"

_BY_REASON: dict[str, str] = {
    _NEIGHBOURS: "ernie4_5_moe helium",
    f"{_NEIGHBOURS}; {_PARALLEL}; its logits are scaled": "cohere2_moe",
    _QK_NORM: "exaone_moe hunyuan_v1_dense "
    "hunyuan_v1_moe minimax_m2 flex_olmo mellum kolibri1 flint doge dots1 hy_v3 "
    "minimax_m3_vl_text qwen4_exp_text",
    f"{_QK_NORM}; its logits are capped": "nanochat",
    f"{_QK_NORM}; {_ZERO_CENTRED}": "gemma3n_text gemma4_text gemma4_unified_text",
    f"{_QK_NORM}; {_RECURRENT}": "qwen3_next qwen3_5_text qwen3_5_moe_text olmo_hybrid lfm2 "
    "lfm2_moe lfm3 kimi_linear",
    "its norms are zero-centred and its logits capped, which Nanotron does not do": "vaultgemma",
    _RENORMALISED: "phimoe granitemoe granitemoeshared minimax jetmoe dbrx aria_text solar_open",
    f"{_RENORMALISED}; its attention has learned sinks": "granitemoe_swa",
    _LAYER_NORM: "olmo jais2 orion cohere_compass_text",
    f"{_LAYER_NORM}; {_PARTIAL}": "nemotron persimmon",
    f"{_PARTIAL}; {_PARALLEL}": "phi gptj codegen",
    "its q, k and v are one tensor, and so are gate and up; there is no table for it": "chatglm",
    _FUSED: "internlm2 baichuan qwen exaone telechat",
    f"{_POSITIONS}; {_LAYER_NORM}": "gpt2 gpt_neo gpt_bigcode opt openai-gpt biogpt xglm "
    "gpt-sw3 cpmant ctrl",
    f"{_ALIBI}; {_LAYER_NORM}": "bloom mpt",
    f"{_PARALLEL}; {_LAYER_NORM}": "falcon",
    _MLA: "deepseek_v2 deepseek_v32 deepseek_v4 minicpm3 youtu longcat_flash "
    "glm4_moe_lite glm_moe_dsa mistral4 axk1 axk2 hy_v4 dots3_note_text",
    "its keys and values pass a short convolution, which Nanotron does not have": "inkling_text "
    "inkling2_text",
    "its attention has a gate, and it runs its layers several times": "hrm_text",
    "its layers have norms inside attention and MLP, which Nanotron does not have": "bitnet",
    "it subtracts two attentions from each other, which Nanotron does not do": "diffllama",
    "it scales queries by their position, which Nanotron does not do": "ministral3",
    "its attention is chunked, and queries without rotary embedding are scaled": "llama4_text",
    "embeddings, residuals and logits are scaled (scale_emb and others)": "minicpm",
    "its key-value heads differ between layers, and Nanotron's do not": "deci openelm",
    _MIXED_WINDOWS: "cwm granite_swa mimo_v2_flash laguna afmoe",
    _RECURRENT: "mamba mamba2 falcon_mamba falcon_h1 jamba bamba zamba zamba2 nemotron_h "
    "recurrent_gemma rwkv xlstm granitemoehybrid zaya bailing_hybrid",
    _MULTIMODAL: "phi4_multimodal llava llava_next llava_onevision mllama llama4 gemma3 gemma3n "
    "gemma4 qwen2_vl "
    "qwen2_5_vl qwen3_vl qwen3_vl_moe qwen2_5_omni qwen3_5 qwen3_5_moe mistral3 pixtral idefics2 "
    "idefics3 smolvlm paligemma internvl glm4v glm4v_moe florence2 aria janus chameleon fuyu "
    "blip-2 got_ocr2 kimi_k25 ovis2 deepseek_vl aya_vision emu3 cohere_compass dots3_note "
    "gemma4_unified qwen4_exp inkling inkling2 minimax_m3_vl",
    _ENCODER: "bert roberta distilbert xlm-roberta deberta deberta-v2 electra albert mpnet "
    "modernbert camembert esm nomic_bert big_bird longformer",
    _ENCODER_DECODER: "t5 mt5 umt5 bart mbart pegasus marian m2m_100 longt5 t5gemma blenderbot",
    _NOT_TEXT: "clip siglip vit whisper wav2vec2 hubert sam dinov2 swin convnext resnet detr "
    "layoutlmv3 timm_wrapper",
}
# Why Nanotron cannot compute a model type, whatever its keys say.
REFUSED: Mapping[str, str] = {
    name: reason for reason, names in _BY_REASON.items() for name in names.split()
}


def refusal_of(model_type: str) -> str | None:
    """Why Nanotron cannot compute a model type, however it is spelled; None where it may."""
    return REFUSED.get(model_type.lower())


def like_llama(model_type: str) -> Mapping[str, Any] | None:
    """The defaults of a type that computes as a Llama where its keys are neutral; else None."""
    return LIKE_LLAMA.get(model_type.lower())


# Model types that compute as a Llama where their keys are neutral: their classes' defaults, for
# the keys that a config.json leaves out.
_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "mlp_bias": False,
    "attention_bias": False,
    "num_key_value_heads": None,
    "sliding_window": None,
    "max_position_embeddings": 2048,
}
_MULTIPLIERS = {
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}
LIKE_LLAMA: Mapping[str, Mapping[str, Any]] = {
    "hyperclovax": {**_COMMON, **_MULTIPLIERS, "attention_multiplier": None, "use_post_norm": True},
    "internlm3": {
        **_COMMON,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 32768,
    },
    "iquestcoder": {
        **_COMMON,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
    },
    "ministral": {
        **_COMMON,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
}


# Whether a key's value changes nothing in a model.
_Rule = Callable[[object, ModelSpec], bool]


def _is_softmax_scale(value: object, spec: ModelSpec) -> bool:
    # A number, and one that a double can hold: JSON has larger ones.
    if not isinstance(value, (int, float)) or not is_number(value):
        return False
    return abs(float(value) * spec.head_dim**0.5 - 1) < 1e-6


def _one_of(*values: object) -> _Rule:
    return lambda value, _: any(value == each for each in values)


def _same_as(field: str) -> _Rule:
    return lambda value, spec: value is None or value == getattr(spec, field)


def _kinds(spec: ModelSpec) -> list[str]:
    return ["full_attention" if each is None else "sliding_attention" for each in spec.windows]


def _words(words: str, rule: _Rule) -> dict[str, _Rule]:
    return dict.fromkeys(words.split(), rule)


# Keys that change what a model computes, and whether a value of theirs changes nothing.
NEUTRAL: Mapping[str, _Rule] = {
    # Factors.
    **_words(
        "embedding_multiplier residual_multiplier logits_scaling logit_scale scale_emb "
        "embedding_scale logits_multiplier lm_head_multiplier rope_percentage rotary_pct rope_pct "
        "partial_rotary_factor routed_scaling_factor",
        _one_of(None, 1),
    ),
    **_words(
        "attention_multiplier softmax_scale",
        lambda value, spec: value is None or _is_softmax_scale(value, spec),
    ),
    "query_pre_attn_scalar": _same_as("head_dim"),
    "dim_model_base": _same_as("hidden_size"),
    # What is there or not.
    **_words(
        "qk_norm use_qk_norm qk_layernorm use_qk_layernorm attn_logit_softcapping "
        "final_logit_softcapping logits_soft_cap logit_softcapping clip_qkv use_parallel_residual "
        "parallel_attn use_post_norm use_sandwich_norm use_attention_gate attn_output_gate "
        "attention_sinks rope_interleave rope_interleaved rotary_interleaved interleaved_rotary "
        "alibi use_alibi lm_head_bias use_mup mup_enabled scale_attn_by_inverse_layer_idx "
        "q_lora_rank kv_lora_rank attention_chunk_size attn_temperature_tuning "
        "sliding_window_pattern multi_query use_bidirectional_attention",
        _one_of(None, False, 0),
    ),
    **_words(
        "num_experts num_local_experts n_routed_experts moe_num_experts n_shared_experts "
        "moe_layers",
        _one_of(None, 0, []),
    ),
    # What differs between layers.
    "no_rope_layers": lambda value, _: (
        not value or (isinstance(value, list) and all(layer == 1 for layer in value))
    ),
    "layer_types": lambda value, spec: value is None or value == _kinds(spec),
    "sliding_window": _same_as("sliding_window"),
    # Other names for what the family reads under its own.
    **_words("attention_out_bias o_bias", _same_as("has_output_bias")),
    **_words("attention_bias qkv_bias use_qkv_bias use_bias", _same_as("has_qkv_bias")),
    "mlp_bias": _same_as("has_mlp_bias"),
    **_words("hidden_activation activation_function", _same_as("hidden_act")),
    **_words("layer_norm_eps layer_norm_epsilon norm_epsilon norm_eps", _same_as("norm_eps")),
    **_words("kv_channels attention_head_dim", _same_as("head_dim")),
}
