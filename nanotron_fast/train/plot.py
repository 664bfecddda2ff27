"""Curves of one run or several: loss and throughput by the step, as PNG and SVG."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanotron_fast.checkpoints.remote.urls import on_disk
from nanotron_fast.checkpoints.small_files import write_file
from nanotron_fast.errors import CheckpointError, ConfigError
from nanotron_fast.extras import require
from nanotron_fast.interruption import ending
from nanotron_fast.train.metrics import FILE, read_metrics

STEM = "training"
FORMATS = ("png", "svg")


def plot(runs: Sequence[str | Path], *, output: str | Path | None = None) -> list[Path]:
    """Draws the runs into one figure; returns the files that were written.

    Args:
        runs: folders of runs (checkpoints.checkpoints_path), or their metrics.jsonl.
        output: the files' path without .png and .svg. Default: `training` in the folder of the
            run, of several in the working directory.

    Raises MissingPackageError, ConfigError; CheckpointError, which names the file, where a run has
    no steps; OSError, which names the file: what was there before is there still.
    """
    if not runs:
        raise ConfigError("plot: name the folder of a run")
    require("plot", "plot")
    files = [_file_of(on_disk(run, "the run")) for run in runs]
    curves = [read_metrics(path) for path in files]
    for path, lines in zip(files, curves, strict=True):
        if not lines:
            raise CheckpointError(f"{path}: no step is finished yet")
    if output is None:
        output = files[0].parent / STEM if len(files) == 1 else Path(STEM)
    stem = Path(output)
    if stem.suffix.removeprefix(".") in FORMATS:
        stem = stem.with_suffix("")
    return _draw(_labels(files), curves, stem)


def _file_of(run: Path) -> Path:
    path = run / FILE if run.is_dir() else run
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; name the folder that a run wrote {FILE} into")
    return path


def _labels(files: Sequence[Path]) -> list[str]:
    """The folders' names; whole paths where two are the same."""
    names = [path.resolve().parent.name for path in files]
    return names if len(set(names)) == len(names) else [str(path.parent) for path in files]


def _draw(labels: Sequence[str], curves: Sequence[list[dict[str, Any]]], stem: Path) -> list[Path]:
    # Without pyplot nothing looks for a display, and no state is left behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for label, lines in zip(labels, curves, strict=True):
        (drawn,) = upper.plot(*_points(lines, "loss"), label=label, linewidth=1.2)
        validation = _points(lines, "validation_loss")
        if validation[0]:
            upper.plot(
                *validation,
                color=drawn.get_color(),
                linestyle="--",
                marker="o",
                markersize=3,
                label=f"{label}, validation",
            )
        lower.plot(*_points(lines, "tokens_per_second"), color=drawn.get_color(), linewidth=1.2)
    upper.set_ylabel("loss")
    lower.set_ylabel("tokens per second")
    lower.set_xlabel("step")
    lower.set_ylim(bottom=0)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    upper.legend()
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for kind in FORMATS:
        path = stem.with_name(f"{stem.name}.{kind}")
        picture = io.BytesIO()
        figure.savefig(picture, format=kind, dpi=150)
        _write(path, picture.getvalue())
        written.append(path)
    return written


def _write(path: Path, picture: bytes) -> None:
    """Writes a whole file, or leaves what was there. Raises OSError, which names it."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        write_file(partial, picture, fsync=False)
        partial.replace(path)
    except BaseException as error:
        with ending():
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise


def _points(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """The steps at which a figure is known, and the figures."""
    known = [(each["step"], each[name]) for each in lines if each.get(name) is not None]
    return [step for step, _ in known], [value for _, value in known]
