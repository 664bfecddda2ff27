"""SmolLM3: every n-th layer has no rotary embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanotron_fast.errors import ConfigError
from nanotron_fast.families.decoder import DENSE
from nanotron_fast.families.family import Family
from nanotron_fast.families.quirk import Quirk
from nanotron_fast.families.qwen2 import DEFAULTS
from nanotron_fast.families.windows import Windows
from nanotron_fast.formats.fields import Fields
from nanotron_fast.formats.nanotron.classes import QWEN2_CONFIG
from nanotron_fast.model.spec import Layer, ModelSpec


@dataclass(frozen=True, slots=True)
class NoRopeLayers(Quirk):
    """`no_rope_layers`, a list of 0 (none) and 1, or every n-th layer by no_rope_layer_interval."""

    keys: frozenset[str] = frozenset({"no_rope_layers", "no_rope_layer_interval"})
    expresses: frozenset[str] = frozenset({"no_rope_layers", "some_no_rope_layers"})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Takes the rotary embedding from those layers. Raises ConfigError."""
        layers: list[Layer] = fields["layers"]
        listed = reader.config.get("no_rope_layers")
        if listed is None:
            interval = reader.positive("no_rope_layer_interval")
            listed = [int((layer + 1) % interval != 0) for layer in range(len(layers))]
        if not isinstance(listed, list) or any(has_rope not in (0, 1) for has_rope in listed):
            raise ConfigError(
                f"config.json: no_rope_layers is {listed!r}, and should be a list of 0 and 1"
            )
        if len(listed) != len(layers):
            raise ConfigError(
                f"config.json: no_rope_layers has {len(listed)} entries for {len(layers)} layers"
            )
        fields["layers"] = [
            each if has_rope else replace(each, attention=replace(each.attention, rotary=None))
            for each, has_rope in zip(layers, listed, strict=True)
        ]

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds the list, and the interval where there is one."""
        without = spec.no_rope_layers
        config["no_rope_layers"] = [int(layer not in without) for layer in range(spec.num_layers)]
        if spec.no_rope_interval is not None:
            config["no_rope_layer_interval"] = spec.no_rope_interval


def _without_rope(reader: Fields, layers: Sequence[Layer]) -> list[bool]:
    """transformers gives a window to the layers without rotary embedding."""
    return [each.attention.rotary is None for each in layers]


FAMILY = Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    model_class=QWEN2_CONFIG,
    rules=DENSE,
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "sliding_window": None,
        "rope_theta": 2000000.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "pad_token_id": 128004,
        "attention_bias": False,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "pretraining_tp": 1,
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    mlp_bias="mlp_bias",
    quirks=(NoRopeLayers(), Windows(older=_without_rope)),
    recognises=lambda model_config: model_config.get("no_rope_layer") is not None,
    extras=("pretraining_tp",),
)
