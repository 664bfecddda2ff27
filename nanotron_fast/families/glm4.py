"""GLM-4 0414 and GLM-Z1: a GLM with norms around attention and MLP."""

from __future__ import annotations

from dataclasses import replace

from nanotron_fast.families import glm
from nanotron_fast.families.decoder import EMBEDDINGS, PROJECTIONS, mlp, norms

# What Hugging Face's class calls the norms: the one before the MLP has another's name.
_NAMES = {
    "post_attention_layernorm": "post_self_attn_layernorm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}

FAMILY = replace(
    glm.FAMILY,
    name="glm4",
    architecture="Glm4ForCausalLM",
    rules=(
        *EMBEDDINGS,
        *norms("input_layernorm", *_NAMES, hf=_NAMES),
        *PROJECTIONS,
        *mlp("mlp", "mlp", "intermediate", is_fused=True),
    ),
    norms="around",
)
