"""Conversations packed into samples, several to each, none of them cut in two."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

import numpy as np

from nanotron_fast.errors import DataError
from nanotron_fast.train.data.cache import CachedTokens
from nanotron_fast.train.data.samples import Array, Sample

# Samples that may still get another conversation while packing goes on.
_OPEN_SAMPLES = 256
_CONVERSATIONS_AT_ONCE = 2**16


class PackedConversations:
    """Samples of whole conversations, whose positions begin anew with each.

    A conversation longer than a sample is cut at its end; one of which nothing is left to learn
    then is left out, as in Nanotron. What remains of a sample is filled with a token that nothing
    is learned of.
    """

    def __init__(
        self,
        conversations: CachedTokens,
        sequence_length: int,
        *,
        pad_token_id: int,
        max_conversations: int | None = None,
    ) -> None:
        """Packs them; of `max_conversations` the first ones. Raises DataError."""
        self._conversations = conversations
        self._length = sequence_length + 1
        self._pad_token_id = pad_token_id
        ends = np.asarray(conversations.ends[:max_conversations]).astype(np.int64)
        begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(ends)]
        self._begins = begins
        self._sizes = np.minimum(ends - begins, self._length)
        chosen = np.flatnonzero(self._num_learned() > 0)
        self.num_left_out = len(ends) - len(chosen)
        self._samples = pack(((int(i), int(self._sizes[i])) for i in chosen), self._length)
        if not self._samples:
            raise DataError(
                f"{conversations.name}: none of its {len(ends):,} conversations has an answer "
                f"within {self._length:,} tokens"
            )

    def _num_learned(self) -> Array:
        """Of each conversation, the tokens that are labels and have a loss."""
        counts = np.zeros(len(self._begins), dtype=np.int64)
        for first in range(0, len(counts), _CONVERSATIONS_AT_ONCE):
            part = slice(first, first + _CONVERSATIONS_AT_ONCE)
            begins, stops = self._begins[part], self._begins[part] + self._sizes[part]
            start = int(begins[0])
            learned = self._conversations.is_learned[start : int(stops[-1])]
            # The first token of a conversation is no label.
            before = np.concatenate([np.zeros(1, np.int64), np.cumsum(learned, dtype=np.int64)])
            afters = np.minimum(begins + 1, stops)
            counts[part] = before[stops - start] - before[afters - start]
        return counts

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int, /) -> Sample:
        tokens = np.full(self._length, self._pad_token_id, dtype=np.int64)
        learned = np.zeros(self._length, dtype=np.bool_)
        positions = np.arange(self._length, dtype=np.int64)
        place = 0
        for conversation in self._samples[index % len(self)]:
            begin, size = int(self._begins[conversation]), int(self._sizes[conversation])
            tokens[place : place + size] = self._conversations.tokens[begin : begin + size]
            learned[place : place + size] = self._conversations.is_learned[begin : begin + size]
            positions[place:] = np.arange(self._length - place)
            # So that the first is no label, whatever is learned of it.
            learned[place] = False
            place += size
        positions[place:] = np.arange(self._length - place)
        return Sample(tokens, positions, learned)

    def place(self, index: int) -> str:
        """Where a sample lies, in words."""
        numbers = ", ".join(str(i) for i in self._samples[index % len(self)])
        return f"{self._conversations.name}, conversations {numbers}"


def pack(items: Iterable[tuple[int, int]], room: int) -> list[tuple[int, ...]]:
    """Numbers and their sizes, put together so that no bin holds more than `room`.

    Each goes into the open bin with the least room that suffices, in order; where too many are
    open, the fullest is closed. Returns the numbers in each bin, bins in the order of their first.
    """
    bins: list[list[int]] = []
    # Room that is left, and the bin.
    free: list[tuple[int, int]] = []
    for number, size in items:
        place = bisect_left(free, (size, 0))
        if place < len(free):
            left, chosen = free.pop(place)
        else:
            left, chosen = room, len(bins)
            bins.append([])
        bins[chosen].append(number)
        if left > size:
            insort(free, (left - size, chosen))
        if len(free) > _OPEN_SAMPLES:
            del free[0]
    return [tuple(each) for each in bins]
