"""GLM-4 9B: neighbours turn in the first half of each head; gate and up are one tensor."""

from __future__ import annotations

from nanotron_fast.families import decoder
from nanotron_fast.families.decoder import ATTENTION, EMBEDDINGS, mlp
from nanotron_fast.families.family import Family
from nanotron_fast.families.rotary import PartialRotary, rope_of_a_part
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG

DEFAULTS = {
    **decoder.DEFAULTS,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-07,
    "max_position_embeddings": 131072,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "bos_token_id": None,
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
}

FAMILY = Family(
    name="glm",
    architecture="GlmForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=(*EMBEDDINGS, *ATTENTION, *mlp("mlp", "mlp", "intermediate", is_fused=True)),
    defaults=DEFAULTS,
    qkv_bias="attention_bias",
    rotates_neighbours=True,
    rope=rope_of_a_part,
    quirks=(PartialRotary(),),
    writes_head_dim=True,
)
