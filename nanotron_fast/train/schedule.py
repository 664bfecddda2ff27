"""The learning rate as a pure function of the step, by Nanotron's formula.

With s = step - 1, w steps of warmup, a decay of d steps that begins at b (the end of the warmup
unless lr_decay_starting_step says otherwise) and x = (s - b) / d:

    s <= w, linear       peak * s / max(w, 1)      so the first step of a warmup has 0
    s <= w, constant     peak
    s < b                peak
    s < b + d            low + (peak - low) * {1 - x | (1 + cos(pi x)) / 2 | 1 - sqrt(x)}
    after that           low

Source: lr_scheduler_builder in nanotron/helpers.py at 2411b022, which this differs from in two
places. Where there is neither warmup nor decay Nanotron multiplies the rate by itself; it is the
peak here. In a constant warmup a group with a peak of its own (muP) has that, and not the common
one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from nanotron_fast.errors import ConfigError
from nanotron_fast.train.config.optimizer import LearningRate

# What remains of the way from the lowest rate to the peak, at a fraction of the decay.
DECAYS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}


def learning_rate(schedule: LearningRate, step: int, *, peak: float | None = None) -> float:
    """The rate that a step uses.

    Args:
        schedule: with lr_decay_steps and min_decay_lr filled in, as in a configuration that was
            read.
        step: counted from 1.
        peak: of a group of parameters that has its own; None for schedule.learning_rate.

    Raises ConfigError on a step below 1 or a schedule without its number of steps.
    """
    if step < 1:
        raise ConfigError(f"step {step}: steps are counted from 1")
    if schedule.lr_decay_steps is None or schedule.min_decay_lr is None:
        raise ConfigError(
            "learning_rate_scheduler: lr_decay_steps and min_decay_lr are not filled in; read the "
            "configuration with TrainingConfig"
        )
    top = schedule.learning_rate if peak is None else peak
    low, warmup = schedule.min_decay_lr, schedule.lr_warmup_steps
    decay = schedule.lr_decay_steps
    begin = warmup if schedule.lr_decay_starting_step is None else schedule.lr_decay_starting_step
    at = step - 1
    if warmup == 0 and decay == 0:
        return top
    if at <= warmup:
        return top if schedule.lr_warmup_style == "constant" else top * at / max(warmup, 1)
    if at < begin:
        return top
    if at < begin + decay:
        return low + (top - low) * DECAYS[schedule.lr_decay_style]((at - begin) / decay)
    return low
