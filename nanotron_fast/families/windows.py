"""What a `config.json` says of sliding windows: another thing in each family and version."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanotron_fast.errors import ConfigError
from nanotron_fast.families.quirk import Quirk
from nanotron_fast.formats.fields import Fields
from nanotron_fast.model.spec import Layer, ModelSpec

_KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class Windows(Quirk):
    """`sliding_window`, on the layers that `layer_types` or an older field names.

    Args:
        older: which layers have one where there is no layer_types and windows are in use.
        older_key: what transformers' older versions read instead, where all of them read it alike.
        has_switch: there are windows only where use_sliding_window is true.
        unused_size: what sliding_window is where no layer has a window, in classes that need a size
            and, always, layer_types.
        keys: what it reads, of which other families' classes need not have the same.
    """

    older: Callable[[Fields, Sequence[Layer]], list[bool]]
    older_key: str | None = None
    has_switch: bool = True
    unused_size: int | None = None
    keys: frozenset[str] = frozenset()
    expresses: frozenset[str] = frozenset({"sliding_window", "some_windows"})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Gives layers their windows. Raises ConfigError where two fields say different things."""
        layers: list[Layer] = fields["layers"]
        kinds = read_kinds(reader, len(layers))
        if self.has_switch and not reader.flag("use_sliding_window"):
            check_no_windows(kinds, "use_sliding_window is false")
            return
        if reader.get("sliding_window") is None:
            check_no_windows(kinds, "sliding_window is null")
            return
        window = reader.positive("sliding_window")
        windowed = self.older(reader, layers) if kinds is None else kinds
        if kinds is not None:
            self._check_older_field(reader, layers, kinds)
        fields["layers"] = [
            replace(each, attention=replace(each.attention, window=window)) if has_window else each
            for each, has_window in zip(layers, windowed, strict=True)
        ]

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds what says the same to every version of transformers."""
        windowed = [window is not None for window in spec.windows]
        config["sliding_window"] = next(filter(None, spec.windows), self.unused_size)
        if self.has_switch:
            config["use_sliding_window"] = any(windowed)
            # Windows start at this layer; after the last, there are none.
            first = [*windowed, True].index(True)
            if all(windowed[first:]):
                config["max_window_layers"] = first
        is_said = self.has_switch or not all(windowed)
        if self.unused_size is not None or (any(windowed) and is_said):
            # What max_window_layers means is another thing in each class and version.
            config["layer_types"] = written_kinds(spec)

    def _check_older_field(
        self, reader: Fields, layers: Sequence[Layer], windowed: list[bool]
    ) -> None:
        """Holds layer_types to what older versions read. Raises ConfigError."""
        key = self.older_key
        if key is None or reader.config.get(key) is None:
            return
        # transformers writes the class's own max_window_layers beside layer_types.
        if key == "max_window_layers" and reader.get(key) == reader.defaults.get(key):
            return
        older = self.older(reader, layers)
        if older != windowed:
            said = f"gives {sum(windowed)} of {len(layers)} layers a sliding window"
            if len({*windowed}) == 1:
                said = f"has {_KINDS[windowed[0]]!r} for every layer"
            raise ConfigError(
                f"config.json: layer_types {said}, and {key} {reader.get(key)!r} gives "
                f"{sum(older)} of {len(layers)} layers a sliding window: which one a model gets "
                "depends on the version that reads it; change one of them"
            )


def _everywhere(reader: Fields, layers: Sequence[Layer]) -> list[bool]:
    return [True] * len(layers)


def _upper_layers(reader: Fields, layers: Sequence[Layer]) -> list[bool]:
    first = reader.get("max_window_layers")
    first = 0 if first is None else reader.integer("max_window_layers")
    return [layer >= first for layer in range(len(layers))]


_PATTERN = "sliding_window_pattern"


def _all_but_every_nth(reader: Fields, layers: Sequence[Layer]) -> list[bool]:
    interval = reader.positive(_PATTERN)
    return [number % interval != 0 for number in range(1, len(layers) + 1)]


def _every_other(reader: Fields, layers: Sequence[Layer]) -> list[bool]:
    return [number % 2 == 0 for number in range(len(layers))]


# On every layer.
PLAIN = Windows(
    older=_everywhere,
    older_key="sliding_window",
    has_switch=False,
    keys=frozenset({"sliding_window", "layer_types"}),
)
# On every layer, where use_sliding_window is true.
SWITCHED = Windows(older=_everywhere, older_key="use_sliding_window")
# On the layers from max_window_layers on, where use_sliding_window is true.
UPPER_LAYERS = Windows(older=_upper_layers, older_key="max_window_layers")
# On every other layer, from the first.
EVERY_OTHER = Windows(
    older=_every_other,
    has_switch=False,
    unused_size=4096,
    keys=frozenset({"sliding_window", "layer_types"}),
)
# On all layers but every n-th, where sliding_window_pattern is n.
ALL_BUT_EVERY_NTH = Windows(
    older=_all_but_every_nth,
    older_key=_PATTERN,
    has_switch=False,
    unused_size=4096,
    keys=frozenset({"sliding_window", "layer_types", _PATTERN}),
)


def read_kinds(reader: Fields, num_layers: int) -> list[bool] | None:
    """Whether each layer has a window, by layer_types; None where the file has none. ConfigError"""
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


def written_kinds(spec: ModelSpec) -> list[str]:
    """`layer_types` of a spec."""
    return [_KINDS[window is not None] for window in spec.windows]


def check_no_windows(kinds: list[bool] | None, why: str) -> None:
    """Refuses layer_types that name layers with windows where there are none. ConfigError."""
    if kinds is not None and any(kinds):
        raise ConfigError(
            f"config.json: layer_types gives {sum(kinds)} of {len(kinds)} layers a sliding "
            f"window, and {why}: change one of them"
        )
