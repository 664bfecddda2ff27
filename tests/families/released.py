"""What the config.json of released models says: one or more of each family."""

from __future__ import annotations

from nanotron_fast import Topology
from tests.families.released_experts import WITH_EXPERTS
from tests.families.released_model import GLM, Released, sizes
from tests.families.released_stock import WITH_STOCK_CLASSES

OLMO2 = {"vocab_size": 100352, "rope_theta": 500000.0, "max_position_embeddings": 4096}
OLMO3 = {
    "vocab_size": 100278,
    "rope_theta": 500000.0,
    "max_position_embeddings": 65536,
    "sliding_window": 4096,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
}
EXAONE4_ROPE = {
    "rope_theta": 1000000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
GRANITE = {
    "vocab_size": 49155,
    "tie_word_embeddings": True,
    "rope_theta": 10000000.0,
    "max_position_embeddings": 131072,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
}
GEMMA = {"head_dim": 256, "vocab_size": 256000, "max_position_embeddings": 8192}
GEMMA2 = {
    **GEMMA,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "cache_implementation": "hybrid",
    "sliding_window": 4096,
}
GEMMA3 = {
    "vocab_size": 262144,
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "cache_implementation": "hybrid",
}
COHERE = {"vocab_size": 256000, "layer_norm_eps": 1e-5, "use_qk_norm": False}


RELEASED: dict[str, Released] = {
    "AFM-4.5B": Released(
        {
            "model_type": "arcee",
            **sizes(2560, 18432, 36, 20, 4),
            "head_dim": 128,
            "vocab_size": 128004,
            "max_position_embeddings": 65536,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 20.0,
                "original_max_position_embeddings": 4096,
            },
        },
        4.62,
        Topology(tp=4, pp=1),
    ),
    "Aya-23-8B": Released(
        {
            "model_type": "cohere",
            **sizes(4096, 14336, 32, 32, 8),
            **COHERE,
            "rope_theta": 10000.0,
            "logit_scale": 0.0625,
        },
        8.03,
        Topology(tp=4, pp=1),
    ),
    "Command-R-35B": Released(
        {
            "model_type": "cohere",
            **sizes(8192, 22528, 40, 64, 64),
            **COHERE,
            "rope_theta": 8000000.0,
            "logit_scale": 0.0625,
        },
        34.98,
        Topology(tp=8, pp=4),
    ),
    "Command-R7B": Released(
        {
            "model_type": "cohere2",
            **sizes(4096, 14336, 32, 32, 8),
            **COHERE,
            "rope_theta": 50000,
            "logit_scale": 0.25,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "order_of_interleaved_layers": "local_attn_first",
            "position_embedding_type": "rope_gptj",
            "rotary_pct": 1.0,
        },
        8.03,
        Topology(tp=4, pp=2),
    ),
    "Command-A-111B": Released(
        {
            "model_type": "cohere2",
            **sizes(12288, 36864, 64, 96, 8),
            **COHERE,
            "rope_theta": 50000,
            "logit_scale": 0.25,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        111.0,
        Topology(tp=8, pp=8),
    ),
    "EXAONE-4.0-1.2B": Released(
        {
            "model_type": "exaone4",
            **sizes(2048, 4096, 30, 32, 8),
            "head_dim": 64,
            "vocab_size": 102400,
            "tie_word_embeddings": True,
            "max_position_embeddings": 65536,
            "sliding_window": None,
            "sliding_window_pattern": None,
            "layer_types": ["full_attention"] * 30,
            **EXAONE4_ROPE,
        },
        1.28,
        Topology(tp=2, pp=1),
    ),
    "EXAONE-4.0-32B": Released(
        {
            "model_type": "exaone4",
            **sizes(5120, 27392, 64, 40, 8),
            "head_dim": 128,
            "vocab_size": 102400,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "sliding_window_pattern": "LLLG",
            "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16,
            **EXAONE4_ROPE,
        },
        32.0,
        Topology(tp=8, pp=4),
    ),
    "Gemma-2B": Released(
        {"model_type": "gemma", **sizes(2048, 16384, 18, 8, 1), **GEMMA},
        2.51,
        Topology(tp=1, pp=1),
    ),
    "Gemma-7B": Released(
        {"model_type": "gemma", **sizes(3072, 24576, 28, 16, 16), **GEMMA},
        8.54,
        Topology(tp=4, pp=2),
    ),
    "Gemma-2-9B": Released(
        {
            "model_type": "gemma2",
            **sizes(3584, 14336, 42, 16, 8),
            **GEMMA2,
            "query_pre_attn_scalar": 256,
        },
        9.24,
        Topology(tp=8, pp=1),
    ),
    "Gemma-2-27B": Released(
        {
            "model_type": "gemma2",
            **sizes(4608, 36864, 46, 32, 16),
            **GEMMA2,
            "head_dim": 128,
            "query_pre_attn_scalar": 144,
        },
        27.2,
        Topology(tp=8, pp=4),
    ),
    "Gemma-3-1B": Released(
        {
            "model_type": "gemma3_text",
            **sizes(1152, 6912, 26, 4, 1),
            **GEMMA3,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "max_position_embeddings": 32768,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
        1.0,
        Topology(tp=1, pp=2),
    ),
    "Gemma-3-27B, its model of text": Released(
        {
            "model_type": "gemma3_text",
            **sizes(5376, 21504, 62, 32, 16),
            **GEMMA3,
            "vocab_size": 262208,
            "head_dim": 128,
            "query_pre_attn_scalar": 168,
            "max_position_embeddings": 131072,
            "sliding_window": 1024,
            "sliding_window_pattern": 6,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        27.0,
        Topology(tp=8, pp=4),
    ),
    "Granite-3.1-2B": Released(
        {
            "model_type": "granite",
            **sizes(2048, 8192, 40, 32, 8),
            **GRANITE,
            "rope_theta": 5000000.0,
            "attention_multiplier": 0.015625,
            "logits_scaling": 8.0,
        },
        2.53,
        Topology(tp=1, pp=2),
    ),
    "Granite-3.1-8B": Released(
        {
            "model_type": "granite",
            **sizes(4096, 12800, 40, 32, 8),
            **GRANITE,
            "attention_multiplier": 0.0078125,
            "logits_scaling": 16.0,
        },
        8.17,
        Topology(tp=1, pp=4),
    ),
    "ERNIE-4.5-0.3B": Released(
        {
            "model_type": "ernie4_5",
            **sizes(1024, 3072, 18, 16, 2),
            "head_dim": 128,
            "vocab_size": 103424,
            "tie_word_embeddings": True,
            "rope_theta": 500000.0,
        },
        0.36,
        Topology(tp=2, pp=1),
    ),
    "GLM-4-9B-Chat": Released(
        {"model_type": "glm", **sizes(4096, 13696, 40, 32, 2), **GLM},
        9.4,
        Topology(tp=2, pp=2),
    ),
    "GLM-4-9B-0414": Released(
        {"model_type": "glm4", **sizes(4096, 13696, 40, 32, 2), **GLM},
        9.4,
        Topology(tp=2, pp=2),
    ),
    "GLM-4-32B-0414": Released(
        {"model_type": "glm4", **sizes(6144, 23040, 61, 48, 2), **GLM, "attention_bias": False},
        32.57,
        Topology(tp=2, pp=4),
    ),
    "Apertus-8B": Released(
        {"model_type": "apertus", **sizes(4096, 21504, 32, 32, 8), "vocab_size": 131072},
        8.05,
        Topology(tp=4, pp=2),
    ),
    "Pythia-6.9B": Released(
        {
            "model_type": "gpt_neox",
            "hidden_size": 4096,
            "intermediate_size": 16384,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 50432,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "use_parallel_residual": True,
        },
        6.86,
        Topology(tp=4, pp=2),
    ),
    "StableLM-2-1.6B": Released(
        {
            "model_type": "stablelm",
            **sizes(2048, 5632, 24, 32, 32),
            "vocab_size": 100352,
            "use_qkv_bias": True,
        },
        1.64,
        Topology(tp=2),
    ),
    "StableLM-2-12B": Released(
        {
            "model_type": "stablelm",
            **sizes(5120, 13824, 40, 32, 8),
            "vocab_size": 100352,
            "qk_layernorm": True,
            "use_parallel_residual": True,
        },
        12.14,
        Topology(tp=4, pp=2),
    ),
    "Command-R+": Released(
        {
            "model_type": "cohere",
            **sizes(12288, 33792, 64, 96, 8),
            "vocab_size": 256000,
            "rope_theta": 75000000.0,
            "max_position_embeddings": 131072,
            "logit_scale": 0.8333333333333334,
            "use_qk_norm": True,
        },
        103.8,
        Topology(tp=8, pp=4),
    ),
    "OLMo-2-7B": Released(
        {"model_type": "olmo2", **sizes(4096, 11008, 32, 32, 32), **OLMO2},
        7.3,
        Topology(tp=2, pp=2),
    ),
    "OLMo-2-32B": Released(
        {"model_type": "olmo2", **sizes(5120, 27648, 64, 40, 8), **OLMO2},
        32.2,
        Topology(tp=8, pp=2),
    ),
    "Olmo-3-7B": Released(
        {"model_type": "olmo3", **sizes(4096, 11008, 32, 32, 32), **OLMO3},
        7.3,
        Topology(tp=2, pp=1),
    ),
    "Olmo-3-32B": Released(
        {"model_type": "olmo3", **sizes(5120, 27648, 64, 40, 8), **OLMO3},
        32.2,
        Topology(tp=2, pp=8),
    ),
    "Phi-3-mini-4k": Released(
        {
            "model_type": "phi3",
            **sizes(3072, 8192, 32, 32, 32),
            "vocab_size": 32064,
            "sliding_window": 2047,
        },
        3.82,
        Topology(tp=2, pp=2),
    ),
    "Phi-4": Released(
        {
            "model_type": "phi3",
            **sizes(5120, 17920, 40, 40, 10),
            "vocab_size": 100352,
            "max_position_embeddings": 16384,
            "original_max_position_embeddings": 16384,
            "rope_theta": 250000,
        },
        14.66,
        Topology(tp=2, pp=4),
    ),
    "Phi-4-mini": Released(
        {
            "model_type": "phi3",
            **sizes(3072, 8192, 32, 24, 8),
            "vocab_size": 200064,
            "tie_word_embeddings": True,
            "partial_rotary_factor": 0.75,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 48,
                "long_factor": [1.0 + 0.5 * step for step in range(48)],
            },
            "sliding_window": 262144,
        },
        3.84,
        Topology(tp=8, pp=1),
    ),
    "Seed-OSS-36B": Released(
        {
            "model_type": "seed_oss",
            **sizes(5120, 27648, 64, 80, 8),
            "head_dim": 128,
            "vocab_size": 155136,
            "rope_theta": 10000000.0,
        },
        36.15,
        Topology(tp=8, pp=4),
    ),
    "Qwen3-8B": Released(
        {
            "model_type": "qwen3",
            **sizes(4096, 12288, 36, 32, 8),
            "head_dim": 128,
            "vocab_size": 151936,
            "rope_theta": 1000000,
            "max_position_embeddings": 40960,
        },
        8.19,
        Topology(tp=8, pp=1),
    ),
    **{
        f"gpt-oss-{billions}b": Released(
            {
                "model_type": "gpt_oss",
                **sizes(2880, 2880, layers, 64, 8),
                "vocab_size": 201088,
                "num_local_experts": experts,
                "rope_theta": 150000,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 32.0,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "truncate": False,
                    "original_max_position_embeddings": 4096,
                },
            },
            exactly,
            Topology(tp=8, pp=2, ep=8),
        )
        for billions, layers, experts, exactly in ((20, 24, 32, 20.9), (120, 36, 128, 116.8))
    },
    **WITH_EXPERTS,
    **WITH_STOCK_CLASSES,
}
