"""The rows that ZeRO-3 keeps, and states that are cut anew from them."""

from __future__ import annotations

import pytest
import torch

from nanotron_fast.train.sharded import runs_of_rows


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize("dp", [1, 2, 4, 5])
def test_runs_are_the_chunks_that_torch_cuts(rows: int, dp: int) -> None:
    values = torch.arange(rows * 6).view(rows, 2, 3)
    chunks = [chunk.flatten() for chunk in values.chunk(dp)]
    chunks += [values.new_empty(0)] * (dp - len(chunks))
    runs = runs_of_rows(values.shape, dp)
    assert len(runs) == dp
    for (first, end), chunk in zip(runs, chunks, strict=True):
        assert torch.equal(values.flatten()[first:end], chunk)
