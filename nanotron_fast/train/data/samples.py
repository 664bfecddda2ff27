"""A sample, and what yields samples by their index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"

# The length of what never ends.
ENDLESS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence, and the token that comes after it.

    Args:
        tokens: int64 (sequence + 1).
        positions: int64 (sequence + 1), each token's place in its document, so 0 where one begins
            and where the sample does; None where documents are not told apart.
        is_learned: bool (sequence + 1), whether the token is one that the model should predict;
            None for all of them.
    """

    tokens: Array
    positions: Array | None = None
    is_learned: Array | None = None


class Samples(Protocol):
    """Samples by index, each the same whenever it is asked for.

    An index past the length is one into another reading of the same samples, in the same order.
    """

    def __len__(self) -> int:
        """How many samples there are in one reading."""
        ...

    def __getitem__(self, index: int, /) -> Sample | Array:
        """The sample at any index from 0 on; an array is the tokens alone."""
        ...


def as_sample(item: Sample | Array) -> Sample:
    """What an index gave, as a Sample."""
    return item if isinstance(item, Sample) else Sample(np.asarray(item, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class Part:
    """The samples from `start` up to `stop` of others, read again and again."""

    samples: Samples
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int, /) -> Sample | Array:
        return self.samples[self.start + index % len(self)]

    def place(self, index: int) -> str:
        """Where a sample lies, in words."""
        return place_of(self.samples, self.start + index % len(self))


def place_of(samples: Samples, index: int) -> str:
    """Where a sample lies, in words, as far as that is known."""
    place = getattr(samples, "place", None)
    return str(place(index)) if place is not None else f"sample {index:,}"


def positions_from_starts(starts: Array, length: int) -> Array:
    """Each token's place in its document, int64 (length).

    Args:
        starts: places in the sample, above 0 and below `length`, where a document begins; rising,
            and repeated where a document is empty.
        length: of the sample, in tokens.
    """
    places = np.arange(length, dtype=np.int64)
    begun = np.zeros(length, dtype=np.int64)
    begun[starts] = starts
    return places - np.maximum.accumulate(begun)
