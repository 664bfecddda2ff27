"""The short way of a launch gives the driver what Triton's own path gives it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the driver of a GPU is here already"),
]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: here kernels are interpreted."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )


def test_every_operation_launches_what_triton_would() -> None:
    result = _run("-m", "tests.kernels.launcher")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) >= 18
    assert all(line.startswith("ok ") for line in lines)


PLANTED = """
import sys
from nanotron_fast.kernels.runtime import launch
from tests.kernels.launcher import __main__ as launcher

found = launch._binary_of

def with_fault(*arguments):
    binary = found(*arguments)
    return binary._replace(run=lambda x, *rest: binary.run(x + 1, *rest))

launch._binary_of = with_fault
sys.exit(launcher.main(["glu"]))
"""


def test_another_launch_is_seen() -> None:
    result = _run("-c", PLANTED)
    assert result.returncode == 1, result.stderr
    assert "FAILED glu: " in result.stdout
    first = result.stdout.splitlines()[1]
    assert "_forward_kernel: Launched(function=1, grid=(3, 1, 1)" in first
    assert " instead of Launched(function=1, grid=(2, 1, 1)" in first
