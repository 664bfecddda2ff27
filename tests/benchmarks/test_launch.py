"""The benchmark of launches: what a call costs in calls, which is the same on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_launch.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_calls_and_lists_stay_short(tmp_path) -> None:
    """How long they take is for the benchmark to say, on a machine that does nothing else."""
    pytest.importorskip("triton")
    saved = tmp_path / "launch.json"
    only = "glu,attention,accumulate_,accumulate_ of new gradients"
    done = run("--only", only, "--rounds", "1", "--save", str(saved))
    assert done.returncode == 0, done.stderr
    rows = json.loads(saved.read_text())["launch"]
    assert [json.loads(line) for line in done.stdout.splitlines()] == rows
    glu, attention, accumulate, of_new = rows
    assert (glu["launches"], glu["launches_backward"]) == (1, 1)
    # Through torch's custom_op it would be some 150 more.
    for row in (glu, attention):
        assert row["ours calls"] <= row["bare calls"] + 40
        assert row["ours with backward calls"] <= row["bare with backward calls"] + 60
    # A call from Python for each of 600 tensors would be at least as many.
    for row in (accumulate, of_new):
        assert row["tensors"] == 300
        assert row["ours calls"] <= 150
