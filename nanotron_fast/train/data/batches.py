"""Batches: which samples a rank takes at a step, and what they look like to a model.

The order is Nanotron's: samples in a row, micro_batch_size x dp of them to a round, of which a rank
takes micro_batch_size that lie together; and as many rounds to a step as gradients are accumulated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nanotron_fast.errors import DataError
from nanotron_fast.train.data.samples import Sample, Samples, as_sample, place_of

if TYPE_CHECKING:
    import torch

# The label of a token that no loss is taken of; torch's cross-entropy leaves it out.
NO_LABEL = -100


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What a model sees in one forward pass, on the CPU.

    Args:
        input_ids: int64 (micro_batch, sequence).
        labels: int64 (micro_batch, sequence), for each token the one that follows; -100 where no
            loss is taken.
        position_ids: int64 (micro_batch, sequence), each token's place in its document, where
            documents are kept apart: one begins wherever there is a 0, and attention does not look
            beyond. None where a sequence is one document.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """The batches of one data-parallel rank.

    Args:
        samples: where they come from.
        sequence_length: of a sample, in tokens, less the one that comes after.
        micro_batch_size: samples in a forward pass.
        accumulation: forward passes of a rank in a step.
        dp: data-parallel ranks.
        dp_rank: this one.
        first_step: the step that takes the sample `consumed`.
        consumed: samples that were taken before that step.
        keeps_documents_apart: give position_ids where samples have positions.
        learns_first_tokens: take a loss of the first token of a document, which nothing before it
            in its own document could foretell. Nanotron does so in one case alone: its Qwen2 class
            without `_use_doc_masking`.
        vocab_size: token ids must lie below it; None for any.
    """

    samples: Samples
    sequence_length: int
    micro_batch_size: int
    accumulation: int = 1
    dp: int = 1
    dp_rank: int = 0
    first_step: int = 1
    consumed: int = 0
    keeps_documents_apart: bool = False
    learns_first_tokens: bool = False
    vocab_size: int | None = None

    @property
    def samples_per_step(self) -> int:
        """Of all ranks together."""
        return self.micro_batch_size * self.accumulation * self.dp

    def indices(self, step: int) -> list[range]:
        """For each forward pass of this rank at a step, its samples."""
        if step < self.first_step:
            raise ValueError(f"step {step} comes before step {self.first_step}, the first")
        begin = self.consumed + (step - self.first_step) * self.samples_per_step
        begin += self.dp_rank * self.micro_batch_size
        stride = self.micro_batch_size * self.dp
        return [
            range(begin + stride * i, begin + stride * i + self.micro_batch_size)
            for i in range(self.accumulation)
        ]

    def batch(self, step: int) -> list[MicroBatch]:
        """The micro-batches of this rank at a step, counted from 1, over the whole run.

        Raises DataError for a sample of the wrong length, or with tokens that the model has not.
        """
        return [self._collated(indices) for indices in self.indices(step)]

    def _collated(self, indices: range) -> MicroBatch:
        import torch

        samples = [self._checked(index) for index in indices]
        tokens = np.stack([sample.tokens for sample in samples])
        labels = tokens[:, 1:].copy()
        for row, sample in zip(labels, samples, strict=True):
            if sample.positions is not None and not self.learns_first_tokens:
                row[sample.positions[1:] == 0] = NO_LABEL
            if sample.is_learned is not None:
                row[~sample.is_learned[1:]] = NO_LABEL
        positions = None
        if self.keeps_documents_apart and samples[0].positions is not None:
            rows = [sample.positions for sample in samples if sample.positions is not None]
            positions = torch.from_numpy(np.stack(rows)[:, :-1].copy())
        return MicroBatch(
            torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(labels), positions
        )

    def _checked(self, index: int) -> Sample:
        sample = as_sample(self.samples[index])
        if sample.tokens.shape != (self.sequence_length + 1,):
            raise DataError(
                f"sample {index} has the shape {sample.tokens.shape}; a sequence of "
                f"{self.sequence_length} tokens and the one after it are "
                f"({self.sequence_length + 1},)"
            )
        least, most = int(sample.tokens.min()), int(sample.tokens.max())
        if least < 0 or (self.vocab_size is not None and most >= self.vocab_size):
            raise DataError(
                f"{place_of(self.samples, index)}: the token {least if least < 0 else most} is not "
                f"in the model's vocabulary of {self.vocab_size}: was the data made with another "
                "tokenizer?"
            )
        return sample
