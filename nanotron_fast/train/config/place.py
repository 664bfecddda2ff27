"""Where in a configuration a value lies, so that every error can say it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nanotron_fast.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Place:
    """A dotted path within a document, and where that came from.

    Args:
        file: the document's name.
        path: of a value, such as "data_stages.0.sequence_length"; empty for the whole.
        overridden: the paths that the command line set.
    """

    file: str
    path: str = ""
    overridden: frozenset[str] = frozenset()

    def at(self, key: str | int) -> Place:
        """The place of what lies below a key, or below several: "tokens.train_steps"."""
        return replace(self, path=f"{self.path}.{key}" if self.path else str(key))

    def __str__(self) -> str:
        parts = self.path.split(".")
        if any(".".join(parts[:count]) in self.overridden for count in range(1, len(parts) + 1)):
            return f"--{self.path}"
        return f"{self.file}: {self.path}" if self.path else self.file

    def error(self, what: str) -> ConfigError:
        """An error about what lies here; `what` goes on after the place's name."""
        return ConfigError(f"{self}{what}")

    def wrong(self, value: object, wanted: str) -> ConfigError:
        """The error for a value that is not what it should be."""
        return self.error(f" is {shown(value)}, and should be {wanted}")


def shown(value: object) -> str:
    """A value as a message names it, shortened."""
    text = "null" if value is None else repr(value)
    if isinstance(value, bool):
        text = str(value).lower()
    return text if len(text) <= 80 else f"{text[:77]}..."
