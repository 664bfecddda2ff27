"""What a person sees of a run: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from nanotron_fast.train.metrics import StepMetrics
from nanotron_fast.units import size


class OnStep(Protocol):
    """What to call after each step."""

    def __call__(self, metrics: StepMetrics) -> None: ...


@contextmanager
def progress(
    *, first_step: int, last_step: int, interval: int = 1, is_quiet: bool = False
) -> Iterator[OnStep]:
    """Shows the steps of a run on stderr, by what it yields being called after each.

    Args:
        first_step: of this run, which may have resumed.
        last_step: of it.
        interval: steps between two lines, where stderr is no terminal.
        is_quiet: nothing at all, as on every rank but one.
    """
    clock = _Clock(last_step)
    if is_quiet:
        yield lambda metrics: None
    elif sys.stderr.isatty():
        with _bar(clock, first_step, last_step) as on_step:
            yield on_step
    else:

        def on_step(metrics: StepMetrics) -> None:
            seconds_left = clock.after(metrics)
            if metrics.step % interval == 0 or metrics.step in (first_step, last_step):
                print(line(metrics, last_step, seconds_left), file=sys.stderr, flush=True)

        yield on_step


@contextmanager
def _bar(clock: _Clock, first_step: int, last_step: int) -> Iterator[OnStep]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, expand=True) as bar:
        task: Any = bar.add_task("", total=last_step, completed=first_step - 1, figures="")

        def on_step(metrics: StepMetrics) -> None:
            seconds_left = clock.after(metrics)
            figures = "  ".join(_figures(metrics, seconds_left))
            bar.update(task, completed=metrics.step, figures=figures)
            if metrics.validation_loss is not None:
                console.print(
                    f"step {metrics.step}: validation loss {metrics.validation_loss:.4f}",
                    highlight=False,
                )

        yield on_step


def line(metrics: StepMetrics, last_step: int, seconds_left: float) -> str:
    """A step in one line."""
    parts = [f"step {metrics.step}/{last_step}", *_figures(metrics, seconds_left)]
    parts[2:2] = [f"lr {metrics.learning_rate:.3g}", f"grad norm {metrics.grad_norm:.3g}"]
    if metrics.validation_loss is not None:
        parts.append(f"validation loss {metrics.validation_loss:.4f}")
    return "  ".join(parts)


def _figures(metrics: StepMetrics, seconds_left: float) -> Iterator[str]:
    yield f"loss {metrics.loss:.4f}"
    yield f"{_short(metrics.tokens_per_second)} tokens/s"
    if metrics.mfu is not None:
        yield f"MFU {100 * metrics.mfu:.1f}%"
    yield size(metrics.memory_bytes)
    yield f"{duration(seconds_left)} left"


def _short(number: float) -> str:
    """With three digits or so: "12.3k"."""
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}G"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: "1:02:03"."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class _Clock:
    """How long the rest will take, by a running mean of the steps so far.

    The first step also compiles and allocates, so it counts only until there is a second.
    """

    _SHARE_OF_LAST = 0.1

    def __init__(self, last_step: int) -> None:
        self._last_step = last_step
        self._num_steps = 0
        self._mean_seconds = 0.0

    def after(self, metrics: StepMetrics) -> float:
        """Seconds that are left once a step is done."""
        self._num_steps += 1
        share = 1.0 if self._num_steps <= 2 else self._SHARE_OF_LAST
        self._mean_seconds += share * (metrics.seconds - self._mean_seconds)
        return self._mean_seconds * (self._last_step - metrics.step)
