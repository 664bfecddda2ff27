"""When the sums of gradients over data-parallel ranks are started."""

from __future__ import annotations

import pytest

from tests.train.engine import MICRO_BATCHES, NUM_LAYERS, ROWS, Case, Run, batch


def started_after(run: Run, num_announced: int, num_passed: int) -> set[object]:
    """The blocks whose sums are started when backward is over, and nobody waits for them yet."""
    gradients = run.training.gradients
    gradients.begin(num_announced)
    rows = {name: tensor[: num_passed * ROWS] for name, tensor in batch(0, 1, 0).items()}
    run.pipeline.step(**rows, micro_batch_size=ROWS)
    return set(gradients.started)


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_every_layer_and_the_head_are_summed_within_the_last_backward(recompute: str) -> None:
    run = Run(Case(recompute=recompute))
    assert started_after(run, MICRO_BATCHES, MICRO_BATCHES) == {*range(NUM_LAYERS), "head"}
    run.training.gradients.reduce()
    assert not run.training.gradients.started


def test_nothing_is_summed_before_the_last_micro_batch() -> None:
    run = Run(Case())
    assert started_after(run, MICRO_BATCHES + 1, MICRO_BATCHES) == set()
    # A step that failed there leaves nothing behind.
    assert started_after(run, MICRO_BATCHES, MICRO_BATCHES) == {*range(NUM_LAYERS), "head"}


def test_a_tied_matrix_is_not_summed_with_the_head_that_it_is() -> None:
    run = Run(Case(is_tied=True))
    # The final norm alone is behind the last layer.
    assert started_after(run, MICRO_BATCHES, MICRO_BATCHES) == {*range(NUM_LAYERS), "head"}
    behind = [each.name for each in run.trained if each.facts.param.block in ("norm", "head")]
    assert behind == ["model.final_layer_norm.pp_block.weight"]


def test_a_validation_starts_nothing() -> None:
    run = Run(Case())
    run.training.gradients.begin(1)
    run.evaluate(0)
    assert not run.training.gradients.started
