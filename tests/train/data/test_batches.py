"""Batches are a function of the step and of the rank, in Nanotron's order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from threading import Event

import numpy as np
import pytest
import torch

from nanotron_fast.errors import DataError
from nanotron_fast.train.data import Batches, Sample
from nanotron_fast.train.data.prefetch import ahead
from nanotron_fast.train.data.samples import Part, positions_from_starts
from nanotron_fast.train.data.synthetic import SyntheticSamples
from tests.train.data.nanotron_order import labels, sampler


@dataclass
class Numbered:
    """Sample i holds i * 10, i * 10 + 1, and so on."""

    sequence: int = 4

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> np.ndarray:
        return np.arange(self.sequence + 1) + index * 10


def first_samples(batches: Batches, step: int) -> list[list[int]]:
    """The samples of each micro-batch."""
    return [(micro.input_ids[:, 0] // 10).tolist() for micro in batches.batch(step)]


@pytest.mark.parametrize(
    ("micro", "accumulation", "dp"), [(1, 1, 1), (2, 3, 1), (2, 1, 4), (3, 2, 2)]
)
def test_order_is_that_of_nanotrons_sampler(micro: int, accumulation: int, dp: int) -> None:
    for rank in range(dp):
        batches = Batches(
            samples=Numbered(),
            sequence_length=4,
            micro_batch_size=micro,
            accumulation=accumulation,
            dp=dp,
            dp_rank=rank,
            first_step=5,
            consumed=12,
        )
        expected = sampler(10_000, 12, micro, rank, dp)
        for step in (5, 6, 7):
            assert first_samples(batches, step) == list(islice(expected, accumulation))


def test_a_step_has_the_same_samples_at_every_dp() -> None:
    def of_step(dp: int, accumulation: int, step: int) -> list[int]:
        found = []
        for rank in range(dp):
            batches = Batches(
                samples=Numbered(),
                sequence_length=4,
                micro_batch_size=2,
                accumulation=accumulation,
                dp=dp,
                dp_rank=rank,
            )
            found += [index for micro in first_samples(batches, step) for index in micro]
        return sorted(found)

    for step in (1, 2, 9):
        assert of_step(1, 4, step) == of_step(2, 2, step) == of_step(4, 1, step)
        assert of_step(1, 4, step) == list(range((step - 1) * 8, step * 8))


def test_a_batch_depends_on_nothing_but_the_step() -> None:
    batches = Batches(
        samples=SyntheticSamples(100, 8, 7), sequence_length=8, micro_batch_size=2, accumulation=2
    )
    forward = [batches.batch(step) for step in (1, 2, 3)]
    again = replace(batches, first_step=3, consumed=8).batch(3)
    backward = [batches.batch(step) for step in (3, 2, 1)][::-1]
    for there, back in zip(forward, backward, strict=True):
        for one, other in zip(there, back, strict=True):
            assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(again[1].labels, forward[2][1].labels)
    with pytest.raises(ValueError, match="before"):
        replace(batches, first_step=3).batch(2)


def test_what_a_micro_batch_is() -> None:
    [micro] = Batches(samples=Numbered(), sequence_length=4, micro_batch_size=2).batch(1)
    assert micro.input_ids.dtype == micro.labels.dtype == torch.int64
    assert micro.input_ids.tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]
    assert micro.labels.tolist() == [[1, 2, 3, 4], [11, 12, 13, 14]]
    assert micro.position_ids is None
    assert micro.input_ids.is_contiguous()
    assert micro.labels.is_contiguous()


POSITIONS = [0, 1, 2, 0, 0, 1]
TOKENS = [5, 6, 7, 8, 9, 10]


@dataclass
class Documents:
    is_learned: list[bool] | None = None

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        learned = None if self.is_learned is None else np.array(self.is_learned)
        return Sample(np.array(TOKENS), np.array(POSITIONS), learned)


def test_no_label_is_the_first_token_of_a_document() -> None:
    apart = Batches(
        samples=Documents(), sequence_length=5, micro_batch_size=1, keeps_documents_apart=True
    )
    [micro] = apart.batch(1)
    assert micro.labels.tolist() == [labels(TOKENS, POSITIONS)] == [[6, 7, -100, -100, 10]]
    assert micro.position_ids is not None
    assert micro.position_ids.tolist() == [POSITIONS[:-1]]
    assert micro.position_ids.dtype == torch.int64
    # Nanotron's Llama has no positions, and its labels are dropped all the same.
    [micro] = replace(apart, keeps_documents_apart=False).batch(1)
    assert micro.position_ids is None
    assert micro.labels.tolist() == [labels(TOKENS, POSITIONS)]
    # Its Qwen2 without _use_doc_masking learns them.
    [micro] = replace(apart, keeps_documents_apart=False, learns_first_tokens=True).batch(1)
    assert micro.labels.tolist() == [labels(TOKENS, None)]


def test_what_is_not_learned_is_no_label() -> None:
    samples = Documents([True, False, True, True, True, False])
    [micro] = Batches(samples=samples, sequence_length=5, micro_batch_size=1).batch(1)
    assert micro.labels.tolist() == [[-100, 7, -100, -100, -100]]


def test_tokens_that_the_model_has_not() -> None:
    batches = Batches(samples=Numbered(), sequence_length=4, micro_batch_size=1, vocab_size=14)
    batches.batch(1)
    with pytest.raises(DataError, match=r"sample 1: the token 14 .* vocabulary of 14"):
        batches.batch(2)
    with pytest.raises(DataError, match=r"shape \(5,\).*5 tokens.*\(6,\)"):
        replace(batches, sequence_length=5).batch(1)


def test_synthetic_tokens_are_uniform_and_never_repeat() -> None:
    samples = SyntheticSamples(7, 1000, 3)
    tokens = np.concatenate([samples[i].tokens for i in range(20)])
    counts = np.bincount(tokens, minlength=7)
    assert len(counts) == 7
    assert np.abs(counts / len(tokens) - 1 / 7).max() < 0.01
    assert samples[0].tokens.tolist() != samples[1].tokens.tolist()
    assert samples[0].tokens.tolist() != SyntheticSamples(7, 1000, 4)[0].tokens.tolist()
    assert samples[2**62].tokens.dtype == np.int64
    # The same on every machine and with every version.
    assert SyntheticSamples(1000, 5, 42)[9].tokens.tolist() == [789, 125, 981, 942, 536, 817]


def test_a_part_is_read_again_and_again() -> None:
    part = Part(Numbered(), 3, 5)
    assert [int(np.asarray(part[i])[0]) // 10 for i in range(5)] == [3, 4, 3, 4, 3]


def test_positions_where_documents_are_empty() -> None:
    assert positions_from_starts(np.array([2, 2, 3]), 6).tolist() == [0, 1, 0, 0, 1, 2]
    assert positions_from_starts(np.array([], dtype=np.int64), 3).tolist() == [0, 1, 2]


def test_batches_are_made_ahead_and_errors_come_with_their_step() -> None:
    second = Event()

    def batch(step: int) -> int:
        if step == 2:
            second.set()
        if step == 3:
            raise DataError("step 3 has no data")
        return step * 10

    steps = ahead(batch, range(1, 6))
    assert next(steps) == 10
    assert second.wait(60)
    assert next(steps) == 20
    with pytest.raises(DataError, match="step 3"):
        next(steps)
