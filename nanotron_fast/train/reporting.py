"""Where the figures of a run's steps go: a file, trackers, and what a person sees."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

import torch

from nanotron_fast.train.config import TrainingConfig, run_name
from nanotron_fast.train.metrics import FILE, MetricsFile, StepMetrics
from nanotron_fast.train.progress import progress
from nanotron_fast.train.trackers import Trackers

Report = Callable[[StepMetrics], None]


@contextmanager
def reporting(
    config: TrainingConfig,
    *,
    is_first_rank: bool,
    is_quiet: bool,
    done: int,
    warn: Callable[[str], None],
) -> Iterator[Report]:
    """What to call after each step; on every rank but the first it does nothing.

    Where no step is left no file is touched: such a run has no claim on the folder.

    Args:
        is_quiet: nothing is shown; the file and the trackers have it all the same.
        done: steps that were taken before.

    Raises OSError, CheckpointError where the metrics of an earlier run cannot be gone on with.
    """
    if not is_first_rank or done == config.tokens.train_steps:
        yield lambda metrics: None
        return
    root = Path(config.checkpoints.checkpoints_path)
    with ExitStack() as stack:
        file = stack.enter_context(MetricsFile(root / FILE, after_step=done))
        trackers = Trackers.of_run(
            root,
            project=config.general.project,
            run=run_name(config.general.run, datetime.now(), os.environ),
            config=config.to_dict(),
            first_step=done + 1,
            warn=warn,
        )
        stack.callback(trackers.close)
        show = stack.enter_context(
            progress(
                first_step=done + 1,
                last_step=config.tokens.train_steps,
                interval=config.logging.iteration_step_info_interval,
                is_quiet=is_quiet,
            )
        )

        def report(metrics: StepMetrics) -> None:
            file.write(metrics)
            trackers.write(metrics)
            show(metrics)

        yield report


def peak_memory_bytes(device: torch.device) -> int:
    """What torch has allocated at most on a GPU, or the process on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
