"""Synthetic tokens, for trials of speed and memory: `dataset: null`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanotron_fast.train.data.samples import ENDLESS, Sample


@dataclass(frozen=True, slots=True)
class SyntheticSamples:
    """Independent tokens, each id of the vocabulary as likely as any other.

    So the loss cannot fall below log(vocab_size). A sample is a function of the seed and its index:
    64-bit words of Philox with that key, modulo the vocabulary. Nanotron draws from the same
    distribution, by another generator that goes on from step to step.
    """

    vocab_size: int
    sequence_length: int
    seed: int

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int, /) -> Sample:
        key = np.array([self.seed % 2**64, index], dtype=np.uint64)
        words = np.random.Philox(key=key).random_raw(self.sequence_length + 1)
        return Sample((words % np.uint64(self.vocab_size)).astype(np.int64))
