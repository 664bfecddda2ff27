"""Gemma 2: four norms a layer, scaled embeddings, capped scores and logits."""

from __future__ import annotations

from nanotron_fast.families.decoder import EMBEDDINGS, PROJECTIONS, mlp, norms
from nanotron_fast.families.factors import LogitCap, ScaledEmbedding, ScoreCap, ScoreScale
from nanotron_fast.families.family import Family
from nanotron_fast.families.rules import Rule
from nanotron_fast.families.windows import EVERY_OTHER
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG

RULES: tuple[Rule, ...] = (
    *EMBEDDINGS,
    *norms("input_layernorm"),
    *PROJECTIONS,
    *norms("post_attention_layernorm", "pre_feedforward_layernorm"),
    *mlp("mlp", "mlp", "intermediate"),
    *norms("post_feedforward_layernorm"),
)
# What all Gemmas assume.
COMMON = {
    "tie_word_embeddings": True,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "use_cache": True,
}
DEFAULTS = {
    **COMMON,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
# Scores are divided by the root of a number of their own.
SCORES = ScoreScale("query_pre_attn_scalar", -0.5)
# A model whose tokens see those after them is an encoder.
NEUTRAL = ("use_bidirectional_attention",)

FAMILY = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=RULES,
    defaults=DEFAULTS,
    keys={"hidden_act": "hidden_activation"},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    norms="around",
    norm_adds_one=True,
    quirks=(EVERY_OTHER, SCORES, ScoreCap(), LogitCap(), ScaledEmbedding()),
    writes_head_dim=True,
    neutral=NEUTRAL,
)
