"""OLMo 3: OLMo 2 with windows on three of four layers, which rope_scaling leaves alone."""

from __future__ import annotations

from collections.abc import Sequence

from nanotron_fast.families import olmo2
from nanotron_fast.families.family import Family
from nanotron_fast.families.rope_kinds import UnscaledWindows, full_rope
from nanotron_fast.families.windows import Windows
from nanotron_fast.formats.fields import Fields
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG
from nanotron_fast.model.spec import Layer

# The base where config.json has none: that of transformers 5. In 4 it is 10000.
_THETA = 500000.0


def _three_of_four(reader: Fields, layers: Sequence[Layer]) -> list[bool]:
    return [(layer + 1) % 4 != 0 for layer in range(len(layers))]


FAMILY = Family(
    name="olmo3",
    architecture="Olmo3ForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=olmo2.RULES,
    defaults={**olmo2.DEFAULTS, "rope_theta": _THETA, "sliding_window": 4096},
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    norms="after",
    qk_norm="whole",
    rope=full_rope,
    quirks=(
        Windows(
            older=_three_of_four,
            has_switch=False,
            keys=frozenset({"sliding_window", "layer_types"}),
            unused_size=4096,
        ),
        UnscaledWindows(assumed=_THETA),
    ),
)
