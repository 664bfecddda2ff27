"""Joined texts cut into windows of sequence + 1 tokens that overlap by one, as Nanotron does it."""

from __future__ import annotations

import numpy as np

from nanotron_fast.errors import DataError
from nanotron_fast.train.data.cache import CachedTokens
from nanotron_fast.train.data.nanoset import starts_within
from nanotron_fast.train.data.samples import Sample, positions_from_starts


class TextWindows:
    """Samples of joined texts: every token but the first is a label once.

    Texts of files are joined from the first to the last. Those of `datasets` are joined in groups,
    of which Nanotron leaves out the rest that fills no window, and the last whole window too.
    """

    def __init__(
        self, text: CachedTokens, sequence_length: int, *, has_positions: bool = False
    ) -> None:
        """`has_positions` gives each token's place in its document. Raises DataError."""
        self._text = text
        self._sequence_length = sequence_length
        self._has_positions = has_positions
        if text.group_ends is None:
            begins, ends = np.zeros(1, np.int64), np.array([text.num_tokens], np.int64)
            left_out = 0
        else:
            ends = text.group_ends
            begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(ends)]
            left_out = 1
        counts = np.maximum((ends - begins - 1) // sequence_length - left_out, 0)
        self._begins = begins
        # Of each group, the first of its windows.
        self._firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        if not len(self):
            in_groups = f" in {len(begins):,} groups of texts" if left_out else ""
            raise DataError(
                f"{text.name}: {text.num_tokens:,} tokens{in_groups} are too few for a sample of "
                f"{sequence_length + 1:,}"
            )

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: int, /) -> Sample:
        first, length = self._first(index), self._sequence_length + 1
        tokens = self._text.tokens[first : first + length].astype(np.int64)
        if not self._has_positions:
            return Sample(tokens)
        starts = starts_within(self._text.ends, first, length)
        return Sample(tokens, positions_from_starts(starts, length))

    def _first(self, index: int) -> int:
        window = index % len(self)
        group = int(np.searchsorted(self._firsts, window, side="right")) - 1
        within = window - int(self._firsts[group])
        return int(self._begins[group]) + within * self._sequence_length

    def place(self, index: int) -> str:
        """Where a sample lies, in words."""
        return f"{self._text.name}, from token {self._first(index):,} on"
