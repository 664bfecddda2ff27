"""Several sources of samples blended by weight, in Nanotron's order."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

import numpy as np

from nanotron_fast import _C
from nanotron_fast.errors import DataError
from nanotron_fast.train.data.samples import ENDLESS, Array, Sample, Samples, place_of

_SAMPLES_PER_CHUNK = 2**16
_CHUNKS_KEPT = 4


class BlendOrder:
    """Which source each sample of a blend is drawn from.

    Sample i goes to the source with the largest weight * max(i, 1) - taken, in double precision,
    the first of equals: a rule that knows where it is only by having gone there. So the counts at
    the beginning of every 65,536 samples are kept as far as was looked (8 bytes a source), and what
    lies between is worked out when it is asked for. The way to sample 10**9 is gone once.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Weights are relative. Raises DataError."""
        given = np.array(weights, dtype=np.float64)
        if not len(given) or len(given) > 32766:
            raise DataError(f"a blend is of 1 to 32766 sources, and there are {len(given)}")
        if not np.isfinite(given).all() or (given < 0).any() or not given.sum() > 0:
            raise DataError(
                f"weights of a blend are numbers from 0 on, not all of them 0: {list(weights)}"
            )
        self._weights = given / np.sum(given)
        self._starts: list[Array] = [np.zeros(len(given), dtype=np.int64)]
        self._chunks: dict[int, tuple[Array, Array]] = {}
        self._lock = Lock()

    def __getitem__(self, index: int, /) -> tuple[int, int]:
        """The source of a sample, and how many samples came from there before."""
        if len(self._weights) == 1:
            return 0, index
        number, within = divmod(index, _SAMPLES_PER_CHUNK)
        with self._lock:
            choices, places = self._chunk(number)
        return int(choices[within]), int(places[within])

    def taken(self, num_samples: int) -> list[int]:
        """How many of the first samples come from each source."""
        if len(self._weights) == 1:
            return [num_samples]
        number, within = divmod(num_samples, _SAMPLES_PER_CHUNK)
        with self._lock:
            taken = self._start(number).copy()
        first = number * _SAMPLES_PER_CHUNK
        _C.blend(self._weights, taken, first=first, count=within)
        return [int(each) for each in taken]

    def _start(self, number: int) -> Array:
        while len(self._starts) <= number:
            taken = self._starts[-1].copy()
            first = (len(self._starts) - 1) * _SAMPLES_PER_CHUNK
            _C.blend(self._weights, taken, first=first, count=_SAMPLES_PER_CHUNK)
            self._starts.append(taken)
        return self._starts[number]

    def _chunk(self, number: int) -> tuple[Array, Array]:
        if number not in self._chunks:
            taken = self._start(number).copy()
            choices = np.empty(_SAMPLES_PER_CHUNK, dtype=np.uint16)
            places = np.empty(_SAMPLES_PER_CHUNK, dtype=np.int64)
            _C.blend(
                self._weights,
                taken,
                first=number * _SAMPLES_PER_CHUNK,
                count=_SAMPLES_PER_CHUNK,
                choices=choices,
                places=places,
            )
            if len(self._starts) == number + 1:
                self._starts.append(taken)
            while len(self._chunks) >= _CHUNKS_KEPT:
                del self._chunks[next(iter(self._chunks))]
            self._chunks[number] = choices, places
        return self._chunks[number]


class BlendedSamples:
    """Samples of several sources, each read in its own order, again and again."""

    def __init__(
        self, sources: Sequence[Samples], order: BlendOrder, offsets: Sequence[int] = ()
    ) -> None:
        """`offsets` are samples of each source that were taken before the first of these."""
        self._sources = tuple(sources)
        self._order = order
        self._offsets = tuple(offsets) or (0,) * len(self._sources)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int, /) -> Sample | Array:
        source, nth = self._order[index]
        return self._sources[source][nth + self._offsets[source]]

    def place(self, index: int) -> str:
        """Where a sample lies, in words."""
        source, nth = self._order[index]
        return place_of(self._sources[source], nth + self._offsets[source])
