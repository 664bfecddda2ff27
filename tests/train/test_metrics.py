"""metrics.jsonl, the lines and the bar that a person sees, trackers, and plots."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nanotron_fast.cli.commands import app
from nanotron_fast.errors import CheckpointError, MissingPackageError
from nanotron_fast.train.metrics import FILE, MetricsFile, StepMetrics, read_metrics
from nanotron_fast.train.plot import plot
from nanotron_fast.train.progress import duration, line, progress
from nanotron_fast.train.trackers import Trackers
from tests.train.full_disk import no_file_beyond


def metrics(step: int, **changes: Any) -> StepMetrics:
    figures: dict[str, Any] = {
        "loss": 10 / step + 1 / 3,
        "learning_rate": 3e-4,
        "grad_norm": 1.25,
        "tokens": 1024 * step,
        "tokens_per_second": 51200.0,
        "mfu": 0.412,
        "memory_bytes": 12_300_000_000,
        "seconds": 0.02,
    }
    return StepMetrics(step=step, **{**figures, **changes})


def write(path: Path, steps: range, *, after_step: int, **changes: Any) -> None:
    with MetricsFile(path, after_step=after_step) as file:
        for step in steps:
            file.write(metrics(step, **changes))


def steps_of(path: Path) -> list[int]:
    return [each["step"] for each in read_metrics(path)]


def test_a_line_a_step_in_full_precision(tmp_path: Path) -> None:
    path = tmp_path / "run" / FILE
    with MetricsFile(path, after_step=0) as file:
        file.write(metrics(1))
        file.write(metrics(2, validation_loss=2.5, grad_norm=math.inf, mfu=None))
        # Readable while the run goes on.
        first, second = (json.loads(each) for each in path.read_text().splitlines())
    assert [*first] == [
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "mfu",
        "memory_bytes",
        "seconds",
    ]
    assert first["loss"] == 10 + 1 / 3
    assert second["validation_loss"] == 2.5
    assert second["grad_norm"] is second["mfu"] is None


def test_a_resumed_run_goes_on_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / FILE
    write(path, range(1, 8), after_step=0)
    with path.open("ab") as file:
        file.write(b'{"step": 8, "lo')
    assert steps_of(path) == [*range(1, 8)]
    write(path, range(6, 8), after_step=5, loss=1.0)
    assert steps_of(path) == [*range(1, 8)]
    assert [each["loss"] for each in read_metrics(path)[4:]] == [10 / 5 + 1 / 3, 1.0, 1.0]
    write(path, range(1, 2), after_step=0)
    assert steps_of(path) == [1]


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_text('{"step": 1}\nnotes\n')
    with pytest.raises(CheckpointError, match="line 2 is no step's metrics: b'notes"):
        MetricsFile(path, after_step=3)
    assert path.read_text() == '{"step": 1}\nnotes\n'


def test_a_full_disk_names_the_file_and_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / FILE
    with MetricsFile(path, after_step=0) as file:
        file.write(metrics(1))
        write_all = os.write
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda descriptor, data: write_all(descriptor, data[:5]))
            with pytest.raises(OSError, match="No space left on device") as caught:
                file.write(metrics(2))
        assert caught.value.filename == str(path)
        assert steps_of(path) == [1]
        file.write(metrics(2))
    assert steps_of(path) == [1, 2]
    assert path.read_bytes().count(b"\n") == 2


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(first_step=3, last_step=10, interval=5) as on_step:
        for step in range(3, 11):
            on_step(metrics(step, seconds=60.0 if step == 3 else 2.0))
    lines = capsys.readouterr().err.splitlines()
    assert [each.split()[1] for each in lines] == ["3/10", "5/10", "10/10"]
    assert lines[0] == (
        "step 3/10  loss 3.6667  lr 0.0003  grad norm 1.25  51.2k tokens/s  MFU 41.2%  12.30 GB  "
        "7:00 left"
    )
    # The first step, which compiles, is forgotten.
    assert lines[1].endswith("0:10 left")


def test_a_line_without_what_is_not_known() -> None:
    text = line(metrics(2, mfu=None, validation_loss=2.5), 4, 3723.0)
    assert "MFU" not in text
    assert text.endswith("1:02:03 left  validation loss 2.5000")
    assert duration(59.7) == "1:00"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    with progress(first_step=1, last_step=2) as on_step:
        on_step(metrics(1))
        on_step(metrics(2, validation_loss=1.5))
    shown = screen.getvalue()
    assert "loss 5.3333" in shown
    assert "2/2" in shown
    assert "step 2: validation loss 1.5000" in shown


def test_nothing_on_other_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(first_step=1, last_step=2, is_quiet=True) as on_step:
        on_step(metrics(1))
    assert capsys.readouterr().err == ""


class Recorder:
    """Stands for a tracker's library; fails at a step if told to."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.written: list[tuple[int, Mapping[str, float]]] = []
        self.options: dict[str, Any] = {}
        self.is_closed = False

    def init(self, **options: Any) -> Recorder:
        self.options = options
        return self

    def log(self, figures: Mapping[str, float], step: int) -> None:
        if step == self.fails_at:
            raise RuntimeError("no connection")
        self.written.append((step, figures))

    def finish(self) -> None:
        self.is_closed = True


def trackers(folder: Path, warnings: list[str], **environment: str) -> Trackers:
    return Trackers.of_run(
        folder, project="p", run="a:b", config={"x": 1}, first_step=1, warn=warnings.append
    )


def install(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> None:
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    module.init = recorder.init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setitem(sys.modules, "tensorboard", None)


def test_a_tracker_that_fails_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(fails_at=2)
    install(monkeypatch, recorder)
    monkeypatch.setenv("WANDB_MODE", "offline")
    warnings: list[str] = []
    found = trackers(tmp_path, warnings)
    assert found.names == ("wandb",)
    assert recorder.options["id"] == "a-b"
    for step in (1, 2, 3):
        found.write(metrics(step, mfu=None))
    found.close()
    ((step, figures),) = recorder.written
    assert step == 1
    assert figures["loss"] == 10 + 1 / 3
    assert "mfu" not in figures
    assert warnings == ["wandb: RuntimeError: no connection; the run goes on without it"]


def test_a_tracker_that_is_not_signed_in_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    install(monkeypatch, recorder)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert trackers(tmp_path, []).names == ()
    monkeypatch.setenv("WANDB_API_KEY", "of a test")
    found = trackers(tmp_path, [])
    assert found.names == ("wandb",)
    found.close()
    assert recorder.is_closed


def test_plots_of_one_run_and_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        with MetricsFile(tmp_path / name / FILE, after_step=0) as file:
            for step in range(1, 6):
                file.write(metrics(step, validation_loss=2.0 if step == 4 else None))
    result = CliRunner().invoke(app, ["plot", str(tmp_path / "a"), "--json"])
    assert result.exit_code == 0, result.output
    files = json.loads(result.stdout)["files"]
    assert files == [str(tmp_path / "a" / f"training.{each}") for each in ("png", "svg")]
    assert Path(files[0]).read_bytes().startswith(b"\x89PNG")
    monkeypatch.chdir(tmp_path)
    both = plot([tmp_path / "a", tmp_path / "b" / FILE], output="both.svg")
    assert both == [Path("both.png"), Path("both.svg")]
    svg = both[1].read_text()
    for words in ("tokens per second", "loss", "a, validation", "b, validation"):
        assert f"<!-- {words} -->" in svg
    gone = CliRunner().invoke(app, ["plot", str(tmp_path / "gone")])
    assert gone.exit_code == 2
    assert "gone: no such file; name the folder" in gone.stderr


def test_a_picture_is_whole_or_as_it_was(tmp_path: Path) -> None:
    write(tmp_path / FILE, range(1, 6), after_step=0)
    (tmp_path / "pic.png").write_bytes(b"earlier")
    with no_file_beyond(4000):
        full = CliRunner().invoke(app, ["plot", str(tmp_path), "--output", str(tmp_path / "pic")])
    assert full.exit_code == 2
    assert full.stderr == f"error: {tmp_path / 'pic.png'}: File too large\n"
    assert (tmp_path / "pic.png").read_bytes() == b"earlier"
    assert sorted(each.name for each in tmp_path.iterdir()) == [FILE, "pic.png"]


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"gone: no such file; name the folder"):
        plot([tmp_path / "gone"])
    (tmp_path / FILE).write_text("")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: no step is finished yet"):
        plot([tmp_path])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        MissingPackageError, match=r"plot needs matplotlib.*'nanotron_fast\[plot\]'"
    ):
        plot([tmp_path])
