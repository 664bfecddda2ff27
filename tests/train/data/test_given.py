"""Batches that a user gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanotron_fast.errors import DataError
from nanotron_fast.train.data.given import GivenBatches


def taken(batch: Any, **changes: Any) -> torch.Tensor:
    given = GivenBatches([batch], rows=2, dp=1, vocab_size=50, max_length=4, **changes)
    [micro] = given.batch(1)
    return micro.labels


def labelled(label: int) -> dict[str, Any]:
    return {"input_ids": [[1, 2], [3, 4]], "labels": [[2, label], [4, 5]]}


def test_lists_and_lists_of_tensors_are_batches() -> None:
    expected = [[2, 3], [5, 6]]
    rows = [[1, 2, 3], [4, 5, 6]]
    assert taken(rows).tolist() == expected
    assert taken([torch.tensor(row) for row in rows]).tolist() == expected
    assert taken(labelled(-100)).tolist() == [[2, -100], [4, 5]]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (labelled(-7), "labels .* has the token -7.*-100 marks no label"),
        (labelled(-101), "has the token -101"),
        (torch.ones(2, 6, dtype=torch.int64), "has the length 5, and the model has 4 positions"),
        ({**labelled(3), "position_ids": [[0, 4], [0, 1]]}, "has the position 4.*below 4"),
        ("abc", r"batch of step 1 .* from a str: a batch is integer tokens \(rows, length \+ 1\)"),
        (None, "from a NoneType"),
        ([[1, 2], [3]], "from a list"),
    ],
)
def test_what_is_no_batch_of_this_model(batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        taken(batch)


def test_a_validation_that_cannot_be_is_told() -> None:
    [note] = GivenBatches([], rows=2, dp=1, vocab_size=50, has_validation=True).notes
    assert "there is no validation" in note
    assert GivenBatches([], rows=2, dp=1, vocab_size=50).notes == ()
