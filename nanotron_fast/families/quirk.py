"""What is said of a model beside its family's table, and what every kind of that has in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nanotron_fast.formats.fields import Fields
from nanotron_fast.model.spec import Layer, ModelSpec


class Quirk:
    """What a family's `config.json` says in a way of its own, or of single layers."""

    __slots__ = ()

    @property
    def keys(self) -> frozenset[str]:
        """The keys it gives a meaning to, which --family cannot take from another model."""
        return frozenset()

    @property
    def expresses(self) -> frozenset[str]:
        """What of `model.needs` can be written so."""
        return frozenset()

    @property
    def aliases(self) -> Mapping[str, tuple[str, ...]]:
        """Other names under which a config may say a key's value once more."""
        return {}

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Changes the fields of the ModelSpec that is being read: "layers" is a list of Layer.

        Raises ConfigError, UnsupportedModelError.
        """

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds its keys to a config. Raises UnsupportedModelError."""


@dataclass(frozen=True, slots=True)
class OneKey(Quirk):
    """A quirk of one key."""

    key: str

    @property
    def keys(self) -> frozenset[str]:
        """The one."""
        return frozenset({self.key})


def set_attention(fields: dict[str, Any], **changes: Any) -> None:
    """Changes the attention of every layer that is being read."""
    layers: list[Layer] = fields["layers"]
    fields["layers"] = [
        replace(each, attention=replace(each.attention, **changes)) for each in layers
    ]
