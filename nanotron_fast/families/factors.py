"""What a `config.json` multiplies or caps values by, under a key of each family's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanotron_fast.families.quirk import OneKey, Quirk, set_attention
from nanotron_fast.formats.fields import Fields
from nanotron_fast.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class ScaledEmbedding(Quirk):
    """Embeddings are multiplied by the root of the hidden size, which no key says."""

    expresses: frozenset[str] = frozenset({"scales"})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Scales them."""
        fields["embedding_scale"] = fields["hidden_size"] ** 0.5


@dataclass(frozen=True, slots=True)
class Factor(OneKey):
    """One of ModelSpec's scales.

    Args:
        key: of config.json.
        name: of the field.
        divides: what config.json has is divided by.
    """

    name: str
    divides: bool = False
    expresses: frozenset[str] = frozenset({"scales"})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Raises ConfigError where it is no number, or one that makes nothing of a model."""
        fields[self.name] = _power(_positive(reader, self.key), -1 if self.divides else 1)

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds the key."""
        config[self.key] = _root(getattr(spec, self.name), -1 if self.divides else 1)


@dataclass(frozen=True, slots=True)
class ScoreScale(OneKey):
    """What attention multiplies its scores by, as the `power` of a number in config.json."""

    power: float
    expresses: frozenset[str] = frozenset({"attention_scale"})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Gives it to every layer where it is not the usual one. Raises ConfigError."""
        scale = _power(_positive(reader, self.key), self.power)
        usual = fields["layers"][0].attention.head_dim ** -0.5
        set_attention(fields, scale=None if scale == usual else scale)

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds the key."""
        scale = spec.attention.scale
        config[self.key] = _root(spec.head_dim**-0.5 if scale is None else scale, self.power)


@dataclass(frozen=True, slots=True)
class ScoreCap(OneKey):
    """The cap of attention's scores; null is none."""

    key: str = "attn_logit_softcapping"
    expresses: frozenset[str] = frozenset({"softcap"})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Gives it to every layer. Raises ConfigError where it is no positive number."""
        set_attention(fields, softcap=_positive_or_none(reader, self.key))

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds the key."""
        config[self.key] = spec.attention.softcap


@dataclass(frozen=True, slots=True)
class LogitCap(OneKey):
    """The cap of logits; null is none."""

    key: str = "final_logit_softcapping"
    expresses: frozenset[str] = frozenset({"logit_softcap"})

    def read(self, reader: Fields, fields: dict[str, Any]) -> None:
        """Raises ConfigError where it is no positive number."""
        fields["logit_softcap"] = _positive_or_none(reader, self.key)

    def write(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Adds the key."""
        config[self.key] = spec.logit_softcap


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
