"""OLMo 2: norms after attention and MLP, and of queries and keys over all heads at once."""

from __future__ import annotations

from nanotron_fast.families import decoder
from nanotron_fast.families.decoder import EMBEDDINGS, PROJECTIONS, mlp, norms, qk_norm
from nanotron_fast.families.family import Family
from nanotron_fast.families.rules import Rule
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG

RULES: tuple[Rule, ...] = (
    *EMBEDDINGS,
    *PROJECTIONS,
    *qk_norm(whole=True),
    *norms("post_attention_layernorm", "post_feedforward_layernorm"),
    *mlp("mlp", "mlp", "intermediate"),
)
DEFAULTS = {
    **decoder.DEFAULTS,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 50279,
    "pad_token_id": 1,
    "attention_bias": False,
}

FAMILY = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=RULES,
    defaults=DEFAULTS,
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    norms="after",
    qk_norm="whole",
)
