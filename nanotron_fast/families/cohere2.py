"""Cohere's Command A: windows on most layers, and no rotary embedding on the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nanotron_fast.families import cohere
from nanotron_fast.families.quirk import Quirk
from nanotron_fast.families.windows import ALL_BUT_EVERY_NTH
from nanotron_fast.formats.fields import Fields
from nanotron_fast.model.spec import Layer


@dataclass(frozen=True, slots=True)
class RopeInWindows(Quirk):
    """Layers without a window have no rotary embedding: the windows say it."""

    expresses: frozenset[str] = frozenset({"no_rope_layers", "some_no_rope_layers"})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Takes it from them."""
        layers: list[Layer] = fields["layers"]
        fields["layers"] = [
            each
            if each.attention.window
            else replace(each, attention=replace(each.attention, rotary=None))
            for each in layers
        ]


FAMILY = replace(
    cohere.FAMILY,
    name="cohere2",
    architecture="Cohere2ForCausalLM",
    rules=cohere.RULES,
    defaults={
        **cohere.DEFAULTS,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    quirks=(ALL_BUT_EVERY_NTH, RopeInWindows(), cohere.LOGITS),
)
