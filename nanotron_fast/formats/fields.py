"""Typed access to the fields of a config file, with errors that name the file and the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nanotron_fast.errors import ConfigError

# What no model has, and what would take all memory to plan for.
MAX_SIZE = 2**40
MAX_COUNT = 10_000


class Fields:
    """A config file's fields, with defaults for those that it leaves out."""

    def __init__(
        self, file: str, config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> None:
        self.file = file
        self.config = config
        self.defaults = defaults or {}

    def get(self, key: str) -> Any:
        """A field as it is; None where neither the file nor the defaults have it."""
        return self.config[key] if key in self.config else self.defaults.get(key)

    def error(self, key: str, what: str) -> ConfigError:
        """What to raise for a field that is not what it should be."""
        return ConfigError(f"{self.file}: {key} is {self.get(key)!r}, and should be {what}")

    def integer(self, key: str) -> int:
        value = self.get(key)
        if value is None:
            raise ConfigError(f"{self.file}: {key} is missing")
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, "an integer")
        return value

    def positive(self, key: str, limit: int = MAX_SIZE) -> int:
        number = self.integer(key)
        if number < 1:
            raise self.error(key, "at least 1")
        if number > limit:
            raise self.error(key, f"at most {limit}")
        return number

    def positive_or_none(self, key: str) -> int | None:
        return None if self.get(key) is None else self.positive(key)

    def number(self, key: str) -> float:
        value = self.get(key)
        if not is_number(value):
            raise self.error(key, "a number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            raise self.error(key, "text")
        return value

    def token_ids(self, key: str) -> int | list[int] | None:
        """An id, a list of ids, or nothing."""
        value = self.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(not isinstance(item, int) or isinstance(item, bool) for item in ids):
            raise self.error(key, "an id, a list of ids, or null")
        return value

    def indices(self, key: str) -> list[int]:
        """A list of integers; null is an empty one."""
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or any(
            not isinstance(item, int) or isinstance(item, bool) for item in value
        ):
            raise self.error(key, "a list of integers")
        return value

    def mapping(self, key: str) -> Mapping[str, Any] | None:
        value = self.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(key, "an object")
        return value


def is_number(value: object) -> bool:
    """Whether a value is a finite number that a double can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False
