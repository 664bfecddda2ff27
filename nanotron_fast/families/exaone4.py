"""EXAONE 4: norms after attention and MLP, and windows on the layers with rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nanotron_fast.families.decoder import DEFAULTS, EMBEDDINGS, PROJECTIONS, mlp, norms, qk_norm
from nanotron_fast.families.family import Family
from nanotron_fast.families.quirk import Quirk
from nanotron_fast.families.windows import check_no_windows, read_kinds, written_kinds
from nanotron_fast.formats.fields import Fields
from nanotron_fast.formats.nanotron.classes import NANOTRON_FAST_CONFIG
from nanotron_fast.model.spec import Attention, Layer, ModelSpec

_WINDOW = 4096


@dataclass(frozen=True, slots=True)
class HybridLayers(Quirk):
    """With a `sliding_window`, layers have either the window or no rotary embedding.

    Which, `layer_types` says, or sliding_window_pattern: every n-th layer has no window. Where
    sliding_window is null, all layers have a rotary embedding and none has a window.
    """

    keys: frozenset[str] = frozenset({"sliding_window", "sliding_window_pattern", "layer_types"})
    expresses: frozenset[str] = frozenset(
        {"sliding_window", "some_windows", "no_rope_layers", "some_no_rope_layers"}
    )

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Gives each layer its window, or takes its rotary embedding. Raises ConfigError."""
        layers: list[Layer] = fields["layers"]
        kinds = read_kinds(reader, len(layers))
        if reader.get("sliding_window") is None:
            check_no_windows(kinds, "sliding_window is null")
            return
        window = reader.positive("sliding_window")
        if kinds is None:
            interval = reader.positive("sliding_window_pattern")
            kinds = [(layer + 1) % interval != 0 for layer in range(len(layers))]

        def changed(attention: Attention, has_window: bool) -> Attention:
            if has_window:
                return replace(attention, window=window)
            return replace(attention, rotary=None)

        fields["layers"] = [
            replace(each, attention=changed(each.attention, has_window))
            for each, has_window in zip(layers, kinds, strict=True)
        ]

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds the window, and the kind of each layer."""
        window = next(filter(None, spec.windows), None)
        # Layers have no rotary embedding where there is a size, be it that of no layer.
        config["sliding_window"] = window or (_WINDOW if spec.no_rope_layers else None)
        config["layer_types"] = written_kinds(spec)


FAMILY = Family(
    name="exaone4",
    architecture="Exaone4ForCausalLM",
    model_class=NANOTRON_FAST_CONFIG,
    rules=(
        *EMBEDDINGS,
        *PROJECTIONS,
        *qk_norm(),
        *norms("post_attention_layernorm", "post_feedforward_layernorm"),
        *mlp("mlp", "mlp", "intermediate"),
    ),
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "sliding_window": _WINDOW,
        "sliding_window_pattern": 4,
    },
    norms="after",
    qk_norm="head",
    quirks=(HybridLayers(),),
)
