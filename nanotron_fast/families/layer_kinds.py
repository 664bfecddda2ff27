"""What a `config.json` says of its layers one by one: rotary embedding or none, window or none."""

from __future__ import annotations

from nanotron_fast.errors import ConfigError, UnsupportedModelError
from nanotron_fast.families.family import Family
from nanotron_fast.formats.fields import Fields

_KINDS = ("full_attention", "sliding_attention")


def _no_rope_layers(reader: Fields, num_layers: int) -> list[int]:
    """The layers without rotary embedding."""
    listed = reader.config.get("no_rope_layers")
    if listed is None:
        interval = reader.positive("no_rope_layer_interval")
        return [layer for layer in range(num_layers) if (layer + 1) % interval == 0]
    if not isinstance(listed, list) or any(has_rope not in (0, 1) for has_rope in listed):
        raise ConfigError(
            f"config.json: no_rope_layers is {listed!r}, and should be a list of 0 and 1"
        )
    if len(listed) != num_layers:
        raise ConfigError(
            f"config.json: no_rope_layers has {len(listed)} entries for {num_layers} layers"
        )
    return [layer for layer, has_rope in enumerate(listed) if not has_rope]


def read_no_rope_interval(reader: Fields, num_layers: int) -> int | None:
    """n where every n-th layer has no rotary embedding; None where all have one.

    Raises ConfigError, UnsupportedModelError.
    """
    without = _no_rope_layers(reader, num_layers)
    if not without:
        return None
    interval = without[0] + 1
    regular = [layer for layer in range(num_layers) if (layer + 1) % interval == 0]
    if without != regular or num_layers % interval:
        raise UnsupportedModelError(
            f"config.json: no_rope_layers leaves rotary embeddings out of layers {without} of "
            f"{num_layers}. Nanotron leaves them out of every n-th layer, where n divides the "
            "number of layers (no_rope_layer)"
        )
    return interval


def read_window(reader: Fields, family: Family, num_layers: int) -> int | None:
    """The window that every layer has, or None where no layer has one.

    Raises ConfigError where two fields say different things, UnsupportedModelError where only some
    layers have a window.
    """
    kinds = _layer_types(reader, num_layers)
    off = _why_no_window(reader, family)
    if off is not None:
        if kinds is not None and any(kinds):
            raise ConfigError(
                f"config.json: layer_types gives {sum(kinds)} of {num_layers} layers a sliding "
                f"window, and {off}: change one of them"
            )
        return None
    window = reader.positive("sliding_window")
    windowed = _windowed_layers(reader, family, num_layers) if kinds is None else kinds
    if any(windowed) and not all(windowed):
        raise UnsupportedModelError(
            f"config.json: {sum(windowed)} of {num_layers} layers have a sliding window. "
            "Nanotron has one on all layers or on none"
        )
    if kinds is not None:
        _check_older_field(reader, family, num_layers, kinds[0])
    return window if windowed[0] else None


def _why_no_window(reader: Fields, family: Family) -> str | None:
    """What says that no layer has a window; None where windows are in use."""
    if family.window is None:
        return f"a {family.name} has none"
    if family.window == "qwen" and not reader.flag("use_sliding_window"):
        return "use_sliding_window is false"
    return "sliding_window is null" if reader.get("sliding_window") is None else None


def _layer_types(reader: Fields, num_layers: int) -> list[bool] | None:
    """Whether each layer has a window, by layer_types; None where the file has none."""
    kinds = reader.config.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or any(kind not in _KINDS for kind in kinds):
        raise ConfigError(
            f"config.json: layer_types is {kinds!r}, and should be a list of {' and '.join(_KINDS)}"
        )
    if len(kinds) != num_layers:
        raise ConfigError(
            f"config.json: layer_types has {len(kinds)} entries for {num_layers} layers"
        )
    return [kind == "sliding_attention" for kind in kinds]


def _windowed_layers(reader: Fields, family: Family, num_layers: int) -> list[bool]:
    """The same without layer_types, where windows are in use."""
    if family.window == "plain":
        return [True] * num_layers
    if family.is_moe:
        raise UnsupportedModelError(
            "config.json: use_sliding_window without layer_types: transformers 4 puts the window "
            "on the layers from max_window_layers on, transformers 5 on every other layer before "
            "it; say which with layer_types"
        )
    if family.has_no_rope_layers:
        without = _no_rope_layers(reader, num_layers)
        return [layer in without for layer in range(num_layers)]
    first = reader.get("max_window_layers")
    first = 0 if first is None else reader.integer("max_window_layers")
    return [layer >= first for layer in range(num_layers)]


def _check_older_field(reader: Fields, family: Family, num_layers: int, is_windowed: bool) -> None:
    """Holds layer_types, alike on all layers, to what older versions read. Raises ConfigError."""
    key = "sliding_window" if family.window == "plain" else "max_window_layers"
    has_one_meaning = not (family.is_moe or family.has_no_rope_layers)
    # transformers writes the class's own max_window_layers beside layer_types, which says nothing.
    is_default = key == "max_window_layers" and reader.get(key) == family.defaults.get(key)
    if reader.config.get(key) is None or is_default or not has_one_meaning:
        return
    older = _windowed_layers(reader, family, num_layers)
    if older != [is_windowed] * num_layers:
        kind = _KINDS[is_windowed]
        raise ConfigError(
            f"config.json: layer_types has {kind!r} for every layer, and {key} "
            f"{reader.get(key)!r} gives {sum(older)} of {num_layers} layers a sliding window: "
            "which one a model gets depends on the version that reads it; change one of them"
        )
