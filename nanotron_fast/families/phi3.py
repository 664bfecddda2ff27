"""Phi-3, Phi-3.5 and Phi-4: q, k and v are one tensor, gate and up another; LongRoPE in some."""

from __future__ import annotations

from nanotron_fast.families import decoder
from nanotron_fast.families.decoder import (
    BLOCK,
    EMBEDDINGS,
    HEADS,
    LAYER,
    OUTPUT,
    ROTARY,
    mlp,
    norms,
)
from nanotron_fast.families.family import Family
from nanotron_fast.families.rotary import LongRope, PartialRotary, rope_of_a_part
from nanotron_fast.families.rules import Fuse
from nanotron_fast.families.windows import PLAIN
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG

_NAMES = {"pre_feedforward_layernorm": "post_attention_layernorm"}
_DROPOUTS = ("attention_dropout", "embd_pdrop", "resid_pdrop")

FAMILY = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=(
        *EMBEDDINGS,
        *norms("input_layernorm", "pre_feedforward_layernorm", hf=_NAMES),
        Fuse(
            f"{LAYER}self_attn.qkv_proj.weight",
            f"{BLOCK}attn.qkv_proj.weight",
            rows=HEADS,
            columns="hidden",
            rotary=ROTARY,
        ),
        *OUTPUT,
        *mlp("mlp", "mlp", "intermediate", is_fused=True),
    ),
    defaults={
        **decoder.DEFAULTS,
        "num_key_value_heads": None,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 1.0,
        "sliding_window": None,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        **dict.fromkeys(_DROPOUTS, 0.0),
    },
    rope=rope_of_a_part,
    quirks=(PLAIN, PartialRotary(), LongRope()),
    extras=_DROPOUTS,
)
