"""Qwen2 and Qwen2.5: biases on q, k and v, and windows on the upper layers."""

from __future__ import annotations

from nanotron_fast.families import decoder
from nanotron_fast.families.family import Family
from nanotron_fast.families.windows import UPPER_LAYERS
from nanotron_fast.formats.nanotron.classes import QWEN2_CONFIG

DEFAULTS = {
    **decoder.DEFAULTS,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    # The class hides it unless use_sliding_window is true.
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_class=QWEN2_CONFIG,
    rules=decoder.DENSE,
    defaults=DEFAULTS,
    qkv_bias=True,
    quirks=(UPPER_LAYERS,),
    recognises=lambda model_config: bool(model_config.get("attention_bias")),
)
