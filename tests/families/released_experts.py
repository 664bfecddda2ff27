"""What the config.json of released models with experts says."""

from __future__ import annotations

from nanotron_fast import Topology
from tests.families.released_model import GLM, Released, sizes

WITH_EXPERTS: dict[str, Released] = {
    "GLM-4.5-Air": Released(
        {
            "model_type": "glm4_moe",
            **sizes(4096, 10944, 46, 96, 8),
            **GLM,
            "rope_theta": 1000000,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 128,
            "num_nextn_predict_layers": 1,
        },
        106.0,
        Topology(tp=8, pp=2, ep=8),
    ),
    "Mixtral-8x7B": Released(
        {
            "model_type": "mixtral",
            **sizes(4096, 14336, 32, 32, 8),
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "router_aux_loss_coef": 0.02,
        },
        46.7,
        Topology(tp=2, pp=2, ep=8),
    ),
    "OLMoE-1B-7B": Released(
        {
            "model_type": "olmoe",
            **sizes(2048, 1024, 16, 16, 16),
            "vocab_size": 50304,
            "clip_qkv": None,
            "num_experts": 64,
            "num_experts_per_tok": 8,
        },
        6.92,
        Topology(tp=2, pp=1, ep=8),
    ),
    "Qwen3-30B-A3B": Released(
        {
            "model_type": "qwen3_moe",
            **sizes(2048, 6144, 48, 32, 4),
            "head_dim": 128,
            "vocab_size": 151936,
            "rope_theta": 1000000.0,
            "norm_topk_prob": True,
        },
        30.53,
        Topology(tp=4, pp=2, ep=8),
    ),
    "DeepSeek-V3": Released(
        {
            "model_type": "deepseek_v3",
            **sizes(7168, 18432, 61, 128, 128),
            "vocab_size": 129280,
            "max_position_embeddings": 163840,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "original_max_position_embeddings": 4096,
            },
        },
        671.0,
        Topology(tp=8, pp=4, ep=8),
    ),
}
