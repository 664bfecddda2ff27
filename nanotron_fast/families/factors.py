"""What a `config.json` multiplies or caps values by, under a key of each family's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nanotron_fast.formats.fields import Fields
from nanotron_fast.model.spec import Layer, ModelSpec

_NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ScaledEmbedding:
    """Embeddings are multiplied by the root of the hidden size, which no key says."""

    keys: frozenset[str] = _NOTHING
    expresses: frozenset[str] = frozenset({"scales"})
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Scales them."""
        fields["embedding_scale"] = fields["hidden_size"] ** 0.5

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Nothing says it."""


@dataclass(frozen=True, slots=True)
class Factor:
    """One of ModelSpec's scales.

    Args:
        key: of config.json.
        name: of the field.
        divides: what config.json has is divided by.
    """

    key: str
    name: str
    divides: bool = False
    expresses: frozenset[str] = frozenset({"scales"})
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def keys(self) -> frozenset[str]:
        """The one."""
        return frozenset({self.key})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Raises ConfigError where it is no number, or one that makes nothing of a model."""
        fields[self.name] = _power(_positive(reader, self.key), -1 if self.divides else 1)

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds the key."""
        config[self.key] = _root(getattr(spec, self.name), -1 if self.divides else 1)


@dataclass(frozen=True, slots=True)
class ScoreScale:
    """What attention multiplies its scores by, as the `power` of a number in config.json."""

    key: str
    power: float
    expresses: frozenset[str] = frozenset({"attention_scale"})
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def keys(self) -> frozenset[str]:
        """The one."""
        return frozenset({self.key})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Gives it to every layer where it is not the usual one. Raises ConfigError."""
        scale = _power(_positive(reader, self.key), self.power)
        usual = fields["layers"][0].attention.head_dim ** -0.5
        _set_attention(fields, scale=None if scale == usual else scale)

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds the key."""
        scale = spec.attention.scale
        config[self.key] = _root(spec.head_dim**-0.5 if scale is None else scale, self.power)


@dataclass(frozen=True, slots=True)
class ScoreCap:
    """The cap of attention's scores; null is none."""

    key: str = "attn_logit_softcapping"
    expresses: frozenset[str] = frozenset({"softcap"})
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def keys(self) -> frozenset[str]:
        """The one."""
        return frozenset({self.key})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Gives it to every layer. Raises ConfigError where it is no positive number."""
        _set_attention(fields, softcap=_positive_or_none(reader, self.key))

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds the key."""
        config[self.key] = spec.attention.softcap


@dataclass(frozen=True, slots=True)
class LogitCap:
    """The cap of logits; null is none."""

    key: str = "final_logit_softcapping"
    expresses: frozenset[str] = frozenset({"logit_softcap"})
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def keys(self) -> frozenset[str]:
        """The one."""
        return frozenset({self.key})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Raises ConfigError where it is no positive number."""
        fields["logit_softcap"] = _positive_or_none(reader, self.key)

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds the key."""
        config[self.key] = spec.logit_softcap


def _set_attention(fields: dict[str, Any], **changes: Any) -> None:
    layers: list[Layer] = fields["layers"]
    fields["layers"] = [
        replace(each, attention=replace(each.attention, **changes)) for each in layers
    ]


def _positive(reader: Fields, key: str) -> float:
    number = reader.number(key)
    if number <= 0:
        raise reader.error(key, "a positive number")
    return number


def _positive_or_none(reader: Fields, key: str) -> float | None:
    return None if reader.get(key) is None else _positive(reader, key)


def _power(value: float, power: float) -> float:
    return value if power == 1 else float(value**power)


def _root(value: float, power: float) -> int | float:
    """A number whose power is the value: a whole one where there is one, as in released models."""
    if power == 1:
        return value
    found = value ** (1 / power)
    return round(found) if _power(round(found), power) == value else found
