"""The learning rate is Nanotron's, at every step of every kind of schedule."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch

from nanotron_fast.errors import ConfigError
from nanotron_fast.train.config import LearningRate
from nanotron_fast.train.schedule import learning_rate

NUM_STEPS = 30
SCHEDULES = [
    LearningRate(
        learning_rate=3e-3,
        lr_warmup_steps=warmup,
        lr_warmup_style=warmup_style,
        lr_decay_style=decay_style,
        lr_decay_steps=decay,
        lr_decay_starting_step=begin,
        min_decay_lr=low,
    )
    for warmup, warmup_style, decay_style, decay, begin, low in itertools.product(
        (0, 1, 7), ("linear", "constant"), ("linear", "cosine", "1-sqrt"), (0, 1, 10, 40),
        (None, 5, 12), (0.0, 1e-4, 3e-3),
    )
]  # fmt: skip


def factor(args: LearningRate, current_step: int, initial_lr: float) -> float:
    """What Nanotron multiplies a group's rate by (lr_lambda of lr_scheduler_builder, 2411b022)."""
    warmup, decay_steps = args.lr_warmup_steps, args.lr_decay_steps
    low = args.min_decay_lr
    assert decay_steps is not None
    assert low is not None
    start = args.lr_decay_starting_step
    if start is None:
        start = warmup
    if current_step <= warmup:
        rate = initial_lr * current_step / max(warmup, 1)
        if args.lr_warmup_style == "constant":
            rate = args.learning_rate
    elif current_step < start:
        rate = initial_lr
    elif current_step < start + decay_steps:
        done = current_step - start
        if args.lr_decay_style == "cosine":
            rate = low + (initial_lr - low) * (1 + math.cos(math.pi * done / decay_steps)) / 2
        elif args.lr_decay_style == "linear":
            rate = low + (initial_lr - low) * (decay_steps - done) / decay_steps
        else:
            rate = low + (initial_lr - low) * (1 - math.sqrt(done / decay_steps))
    else:
        rate = low
    return rate / initial_lr


def test_every_step_has_the_rate_that_torch_sets_in_nanotron() -> None:
    # Where there is neither warmup nor decay Nanotron has a fault: the next test but one.
    schedules = [each for each in SCHEDULES if each.lr_warmup_steps or each.lr_decay_steps]
    assert len(schedules) == len(SCHEDULES) * 11 // 12
    for schedule in schedules:
        top = schedule.learning_rate
        for step in range(1, NUM_STEPS + 1):
            expected = top * factor(schedule, step - 1, top)
            assert math.isclose(learning_rate(schedule, step), expected, rel_tol=1e-13)
    # One in five, which meets every value of every field.
    schedules = schedules[::5]
    groups = [{"params": [torch.zeros(1)], "lr": each.learning_rate} for each in schedules]
    optimizer = torch.optim.SGD(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [partial(factor, each, initial_lr=each.learning_rate) for each in schedules]
    )
    for step in range(1, NUM_STEPS + 1):
        used = [group["lr"] for group in optimizer.param_groups]
        for schedule, rate in zip(schedules, used, strict=True):
            assert math.isclose(learning_rate(schedule, step), rate, rel_tol=1e-13)
        optimizer.step()
        scheduler.step()


def test_a_group_with_a_peak_of_its_own() -> None:
    for schedule in SCHEDULES:
        if schedule.lr_warmup_style == "constant" or not schedule.lr_decay_steps:
            continue
        for step in range(1, NUM_STEPS + 1):
            expected = 0.5 * factor(schedule, step - 1, 0.5)
            rate = learning_rate(schedule, step, peak=0.5)
            assert math.isclose(rate, expected, rel_tol=1e-13)


def test_neither_warmup_nor_decay_is_the_peak() -> None:
    schedule = LearningRate(learning_rate=3e-3, lr_decay_steps=0, min_decay_lr=3e-3)
    assert {learning_rate(schedule, step) for step in range(1, 9)} == {3e-3}
    with_low = LearningRate(learning_rate=3e-3, lr_decay_steps=0, min_decay_lr=0.0)
    assert learning_rate(with_low, 5) == 3e-3


def test_the_first_step_of_a_warmup_has_no_rate() -> None:
    schedule = LearningRate(
        learning_rate=1.0, lr_warmup_steps=4, lr_decay_steps=4, min_decay_lr=0.0
    )
    rates = [learning_rate(schedule, step) for step in range(1, 11)]
    assert rates == [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0, 0]


def test_senseless_questions() -> None:
    with pytest.raises(ConfigError, match="step 0: steps are counted from 1"):
        learning_rate(SCHEDULES[0], 0)
    with pytest.raises(ConfigError, match="lr_decay_steps and min_decay_lr are not filled in"):
        learning_rate(LearningRate(learning_rate=1.0), 1)
