"""Released models of the families that Nanotron's own classes hold."""

from __future__ import annotations

from nanotron_fast import Topology
from tests.families.released_model import Released, sizes

WITH_STOCK_CLASSES: dict[str, Released] = {
    "Llama-3-8B": Released(
        {
            "model_type": "llama",
            **sizes(4096, 14336, 32, 32, 8),
            "vocab_size": 128256,
            "rope_theta": 500000.0,
            "max_position_embeddings": 8192,
        },
        8.03,
        Topology(tp=8, pp=1),
    ),
    "Mistral-7B-v0.1": Released(
        {
            "model_type": "mistral",
            **sizes(4096, 14336, 32, 32, 8),
            "vocab_size": 32000,
            "sliding_window": 4096,
        },
        7.24,
        Topology(tp=4, pp=2),
    ),
    "Mistral-7B-v0.3": Released(
        {
            "model_type": "mistral",
            **sizes(4096, 14336, 32, 32, 8),
            "vocab_size": 32768,
            "rope_theta": 1000000.0,
            "sliding_window": None,
        },
        7.25,
        Topology(tp=8, pp=1),
    ),
    "Ministral-8B": Released(
        {
            "model_type": "mistral",
            **sizes(4096, 12288, 36, 32, 8),
            "head_dim": 128,
            "vocab_size": 131072,
            "rope_theta": 100000000.0,
            "max_position_embeddings": 32768,
            "sliding_window": 32768,
        },
        8.02,
        Topology(tp=2, pp=4),
    ),
    "Qwen2.5-7B": Released(
        {
            "model_type": "qwen2",
            **sizes(3584, 18944, 28, 28, 4),
            "vocab_size": 152064,
            "rope_theta": 1000000.0,
            "max_position_embeddings": 131072,
            "use_sliding_window": False,
            "sliding_window": 131072,
            "max_window_layers": 28,
        },
        7.62,
        Topology(tp=4, pp=2),
    ),
    "Qwen1.5-MoE-A2.7B": Released(
        {
            "model_type": "qwen2_moe",
            **sizes(2048, 5632, 24, 16, 16),
            "vocab_size": 151936,
            "rope_theta": 1000000.0,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
        },
        14.32,
        Topology(tp=8, pp=1),
    ),
    "SmolLM3-3B": Released(
        {
            "model_type": "smollm3",
            **sizes(2048, 11008, 36, 16, 4),
            "vocab_size": 128256,
            "rope_theta": 5000000.0,
            "max_position_embeddings": 65536,
            "tie_word_embeddings": True,
        },
        3.08,
        Topology(tp=2, pp=1),
    ),
    "StarCoder2-3B": Released(
        {
            "model_type": "starcoder2",
            **sizes(3072, 12288, 30, 24, 2),
            "vocab_size": 49152,
            "rope_theta": 999999.4420358813,
            "max_position_embeddings": 16384,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
        3.03,
        Topology(tp=2, pp=1),
    ),
}
