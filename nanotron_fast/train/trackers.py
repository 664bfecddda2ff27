"""TensorBoard and Weights & Biases, where they are installed. Neither can stop a run."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from nanotron_fast.train.metrics import StepMetrics

NAMES = ("tensorboard", "wandb")


class Tracker(Protocol):
    """Somewhere else that figures go."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes the figures of a step."""

    def close(self) -> None:
        """Hands over what is left."""


class _TensorBoard:
    def __init__(self, folder: Path, *, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an abandoned run wrote from this step on is hidden.
        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path, *, project: str, run: str, config: Mapping[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")
        # One id for a name, so that a run that resumes goes on in the same curve.
        run_id = re.sub(r"[/\\#?%:]", "-", run)
        self._run = wandb.init(
            project=project, name=run, id=run_id, resume="allow", config=config, dir=str(folder)
        )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackers:
    """All trackers of a run, on the one rank that reports.

    One that fails is told by `warn` and left out from then on.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._open: dict[str, Tracker] = {}

    @classmethod
    def of_run(
        cls,
        folder: Path,
        *,
        project: str,
        run: str,
        config: Mapping[str, Any],
        first_step: int,
        warn: Callable[[str], None],
    ) -> Trackers:
        """Those that are installed.

        TensorBoard's files go to `folder`/tensorboard. Weights & Biases is used where it is
        signed in or WANDB_MODE says how to do without, since it would ask a question otherwise.
        """
        trackers = cls(warn)
        if _is_installed("tensorboard"):
            trackers._add(
                "tensorboard", lambda: _TensorBoard(folder / "tensorboard", first_step=first_step)
            )
        if _is_installed("wandb") and _wandb_is_wanted(os.environ):
            trackers._add(
                "wandb",
                lambda: _WeightsAndBiases(folder, project=project, run=run, config=config),
            )
        return trackers

    @property
    def names(self) -> tuple[str, ...]:
        """Of the trackers that are open."""
        return tuple(self._open)

    def write(self, metrics: StepMetrics) -> None:
        """Hands the figures of a step on."""
        document = metrics.to_json()
        step = document.pop("step")
        figures = {name: value for name, value in document.items() if value is not None}
        self._each(lambda tracker: tracker.write(step, figures))

    def close(self) -> None:
        """Closes all of them."""
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _add(self, name: str, make: Callable[[], Tracker]) -> None:
        try:
            self._open[name] = make()
        except Exception as error:  # whatever a library or its server raises
            self._tell(name, error)

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                act(tracker)
            except Exception as error:  # likewise
                del self._open[name]
                self._tell(name, error)

    def _tell(self, name: str, error: Exception) -> None:
        self._warn(f"{name}: {type(error).__name__}: {error}; the run goes on without it")


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _wandb_is_wanted(environment: Mapping[str, str]) -> bool:
    mode = environment.get("WANDB_MODE")
    if mode is not None:
        return mode != "disabled"
    if "WANDB_API_KEY" in environment:
        return True
    netrc = Path(environment.get("NETRC", Path.home() / ".netrc"))
    return netrc.is_file() and "wandb" in netrc.read_text(errors="replace")
