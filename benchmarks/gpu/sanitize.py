"""compute-sanitizer over an operation's kernels, in every variant of its checks, in tiny shapes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.context import Context, Small
from benchmarks.gpu.jobs import variants_of_ours
from benchmarks.gpu.rows import Row, emit

_ENTRY = Path(__file__).parents[1] / "run_gpu.py"
# What the tool ends with where it found something; another code is that of the program.
_FOUND = 97
_MOST_LINES = 12


def run(operation: str, variant: str, context: Context) -> None:
    """Emits a row: `ok` is false for what memcheck found, and null where it cannot look."""
    about: Row = {"kind": "machine", "operation": f"compute-sanitizer {operation}"}
    tool = shutil.which("compute-sanitizer")
    if context.dry or not tool:
        note = "a dry run has nothing to look at" if context.dry else "it is not on the PATH"
        emit(about | {"ok": None, "note": note})
        return
    # Calls that fail are torch's, which asks for what a device may lack.
    options = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", str(_FOUND)]
    command = [tool, *options, sys.executable, str(_ENTRY), "--target", "launch", operation, "all"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode == 0:
        emit(about | {"ok": True, "note": lines[-1] if lines else ""})
    elif done.returncode == _FOUND:
        told = [line for line in lines if line.startswith("=====")]
        emit(about | {"ok": False, "error": "\n".join(told[:_MOST_LINES])})
    else:
        emit(about | {"ok": None, "note": f"code {done.returncode}: {' '.join(lines[-3:])}"})


def launch(operation: str) -> None:
    """Launches the kernels of every variant that has some of ours."""
    import torch

    from benchmarks.gpu.harness import build, with_gradients

    for variant in variants_of_ours(operation):
        built = build(operation, variant, Small())
        with_gradients(built.ours, built.inputs)
    torch.cuda.synchronize()
