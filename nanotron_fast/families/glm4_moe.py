"""GLM-4.5 and 4.6: experts as DeepSeek-V3 has them; a part of each head turns, in halves."""

from __future__ import annotations

from nanotron_fast.families import decoder, grouped_experts
from nanotron_fast.families.decoder import ATTENTION, EMBEDDINGS, mlp, qk_norm
from nanotron_fast.families.family import Family
from nanotron_fast.families.qk_norms import QkNorm
from nanotron_fast.families.rotary import PartialRotary, rope_of_a_part
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG

FAMILY = Family(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=(
        *EMBEDDINGS,
        *ATTENTION,
        *qk_norm(),
        *mlp("mlp", "mlp", "intermediate", layers="dense"),
        *grouped_experts.RULES,
    ),
    defaults={
        **decoder.DEFAULTS,
        "num_key_value_heads": 8,
        "head_dim": None,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "partial_rotary_factor": 0.5,
        "attention_bias": False,
        "use_qk_norm": False,
        "bos_token_id": None,
        "eos_token_id": None,
        **grouped_experts.DEFAULTS,
        "n_routed_experts": 128,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
    },
    renamed={"num_local_experts": "n_routed_experts"},
    qkv_bias="attention_bias",
    rope=rope_of_a_part,
    quirks=(PartialRotary(), QkNorm("use_qk_norm", "head"), grouped_experts.GroupedExperts()),
    writes_head_dim=True,
    prediction_layers=grouped_experts.PREDICTION_LAYERS,
)
