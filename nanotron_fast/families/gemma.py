"""Gemma: a Llama with a GELU's gate, scaled embeddings, and norms whose weights lack one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nanotron_fast.errors import ConfigError
from nanotron_fast.families import gemma2
from nanotron_fast.families.decoder import DENSE
from nanotron_fast.families.factors import ScaledEmbedding
from nanotron_fast.families.family import Family
from nanotron_fast.families.quirk import Quirk
from nanotron_fast.formats.fields import Fields
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG


@dataclass(frozen=True, slots=True)
class Gelu(Quirk):
    """`hidden_act`, which some versions of transformers take for another one."""

    # Some versions read this one alone, others not at all.
    aliases: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"hidden_act": ("hidden_activation",)}
    )

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Raises ConfigError for what a version changes."""
        if fields["hidden_act"] == "gelu":
            raise ConfigError(
                f"{reader.file}: hidden_act is 'gelu', which transformers 4 computes and version 5 "
                "takes for 'gelu_pytorch_tanh': released models mean the latter, so write that"
            )


FAMILY = Family(
    name="gemma",
    architecture="GemmaForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=DENSE,
    defaults={
        **gemma2.COMMON,
        "num_key_value_heads": 16,
        "hidden_act": "gelu_pytorch_tanh",
    },
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    norm_adds_one=True,
    quirks=(ScaledEmbedding(), Gelu()),
    writes_head_dim=True,
    neutral=gemma2.NEUTRAL,
)
