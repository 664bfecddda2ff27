"""Mistral: a Llama, with a sliding window in some releases."""

from __future__ import annotations

from nanotron_fast.families.decoder import DEFAULTS, DENSE
from nanotron_fast.families.family import Family
from nanotron_fast.families.windows import PLAIN
from nanotron_fast.formats.nanotron.classes import LLAMA_CONFIG, QWEN2_CONFIG

FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    model_class=LLAMA_CONFIG,
    window_class=QWEN2_CONFIG,
    other_classes=(QWEN2_CONFIG,),
    rules=DENSE,
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    quirks=(PLAIN,),
    recognises=lambda model_config: model_config.get("sliding_window_size") is not None,
    writes_head_dim=True,
)
