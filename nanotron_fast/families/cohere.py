"""Cohere's Command R: attention and MLP side by side on one LayerNorm, and scaled logits."""

from __future__ import annotations

from nanotron_fast.families.decoder import EMBEDDINGS, PROJECTIONS, mlp, norms
from nanotron_fast.families.factors import Factor
from nanotron_fast.families.family import Family
from nanotron_fast.families.qk_norms import QkNorm, norms_of_heads
from nanotron_fast.families.rules import Rule
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG

RULES: tuple[Rule, ...] = (
    *EMBEDDINGS,
    *norms("input_layernorm"),
    *PROJECTIONS,
    *mlp("mlp", "mlp", "intermediate"),
)
# Without rope_theta, which transformers 4 takes for 10000 and version 5 for 500000.
DEFAULTS = {
    "tie_word_embeddings": True,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-5,
    "attention_bias": False,
    "logit_scale": 0.0625,
    "pad_token_id": 0,
    "bos_token_id": 5,
    "eos_token_id": 255001,
    "use_cache": True,
}
LOGITS = Factor("logit_scale", "logit_scale")

FAMILY = Family(
    name="cohere",
    architecture="CohereForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=(*RULES, *norms_of_heads("q_norm.weight", "k_norm.weight")),
    defaults={**DEFAULTS, "use_qk_norm": False},
    keys={"norm_eps": "layer_norm_eps"},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    norm="plain_layer_norm",
    norms="parallel",
    rotates_neighbours=True,
    quirks=(QkNorm("use_qk_norm", "apart"), LOGITS),
)
