"""Some of a topology's ranks: those that a machine with a disk of its own has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanotron_fast.errors import ConfigError, TopologyError
from nanotron_fast.model.topology import Topology

_AXES = ("pp", "tp")


@dataclass(frozen=True, slots=True)
class Ranks:
    """Numbers of pipeline stages and of tensor-parallel ranks, from 0; None stands for all."""

    pp: frozenset[int] | None = None
    tp: frozenset[int] | None = None

    @classmethod
    def parse(cls, flag: str, given: str | Sequence[str]) -> Ranks:
        """From "pp=1", "tp=0-3", "pp=0,2", or several of these, with commas or apart.

        Raises ConfigError, which names the flag.
        """
        found: dict[str, set[int]] = {}
        words = [given] if isinstance(given, str) else list(given)
        for word in words:
            axis = ""
            for token in word.split(","):
                name, equals, rest = token.partition("=")
                if equals:
                    axis = name.strip()
                numbers = _numbers(rest if equals else token)
                if axis not in _AXES or numbers is None:
                    raise ConfigError(f"{flag} {word}: write it as pp=1 or tp=0-3")
                found.setdefault(axis, set()).update(numbers)
        return cls(**{axis: frozenset(numbers) for axis, numbers in found.items()})

    def check(self, topology: Topology) -> None:
        """Raises TopologyError where there are no such ranks."""
        for axis, numbers, size in (("pp", self.pp, topology.pp), ("tp", self.tp, topology.tp)):
            beyond = sorted(number for number in numbers or () if number >= size)
            if beyond:
                raise TopologyError(
                    f"{axis}={beyond[0]}: there is no such rank at {topology}; they count from 0 "
                    f"to {size - 1}"
                )

    def have(self, pp: int, tp: int | None) -> bool:
        """Whether one of them needs a file of a stage; `tp` is None where all of it read it."""
        if self.pp is not None and pp not in self.pp:
            return False
        return tp is None or self.tp is None or tp in self.tp

    def to_json(self) -> dict[str, list[int] | None]:
        """The numbers of each axis, in order; None for all."""
        return {
            axis: None if numbers is None else sorted(numbers)
            for axis, numbers in (("pp", self.pp), ("tp", self.tp))
        }

    def __str__(self) -> str:
        said = [
            f"{axis}={','.join(map(str, sorted(numbers)))}"
            for axis, numbers in (("pp", self.pp), ("tp", self.tp))
            if numbers is not None
        ]
        return " ".join(said)


def _numbers(text: str) -> range | None:
    """0-3 or 3; None where it is neither."""
    first, dash, last = text.strip().partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or len(text) > 20:
        return None
    end = int(last) if dash else int(first)
    return range(int(first), end + 1) if int(first) <= end < 10**6 else None
