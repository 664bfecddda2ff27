"""DeepSeek-V3: latent attention, and experts of which groups are chosen first."""

from __future__ import annotations

from nanotron_fast.families import grouped_experts, mla
from nanotron_fast.families.decoder import DEFAULTS, EMBEDDINGS, mlp
from nanotron_fast.families.family import Family
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG

FAMILY = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=(
        *EMBEDDINGS,
        *mla.NORMS,
        *mla.PROJECTIONS,
        *mlp("mlp", "mlp", "intermediate", layers="dense"),
        *grouped_experts.RULES,
    ),
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 128,
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "attention_bias": False,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "rope_interleave": True,
        **grouped_experts.DEFAULTS,
    },
    renamed={"num_local_experts": "n_routed_experts"},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    quirks=(mla.LatentHeads(), grouped_experts.GroupedExperts()),
    prediction_layers=grouped_experts.PREDICTION_LAYERS,
)
