"""Gemma 3's model of text: norms of queries and keys in place of caps, two rotary embeddings."""

from __future__ import annotations

from dataclasses import replace

from nanotron_fast.families import gemma2
from nanotron_fast.families.decoder import qk_norm
from nanotron_fast.families.factors import LogitCap, ScaledEmbedding
from nanotron_fast.families.rope_kinds import LocalBase, full_rope
from nanotron_fast.families.windows import ALL_BUT_EVERY_NTH

FAMILY = replace(
    gemma2.FAMILY,
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    rules=(*gemma2.RULES, *qk_norm()),
    defaults={
        **gemma2.DEFAULTS,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    qk_norm="head",
    rope=full_rope,
    quirks=(ALL_BUT_EVERY_NTH, LocalBase(), gemma2.SCORES, LogitCap(), ScaledEmbedding()),
    # Its class has a place for a cap of scores, and does not compute with it.
    neutral=(*gemma2.NEUTRAL, "attn_logit_softcapping"),
)
