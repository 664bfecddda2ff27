"""ncu over the kernels of an operation's first check."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.context import Context
from benchmarks.gpu.jobs import CHECKS
from benchmarks.gpu.rows import Row, emit

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / "build" / "gpu" / "ncu"
_METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_percent",
    "launch__registers_per_thread": "registers",
    "dram__bytes.sum": "dram_bytes",
}


def our_kernels() -> list[str]:
    """The names of all Triton kernels of ours: beside them a check launches many of torch's."""
    found: set[str] = set()
    for path in (ROOT / "kernels").rglob("*.py"):
        found |= set(re.findall(r"^@triton\.jit.*\ndef (\w*kernel\w*)\(", path.read_text(), re.M))
    return sorted(found)


def _table(lines: list[str]) -> list[Row]:
    """Kernels and their metrics, of ncu's CSV, which comes after lines of its own."""
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, Row] = {}
    for record in csv.DictReader(lines[start:]):
        name = _METRICS.get(record.get("Metric Name", ""))
        if name:
            row = kernels.setdefault(record["ID"], {"kernel": record["Kernel Name"][:90]})
            row[name] = f"{record['Metric Value']} {record['Metric Unit']}".strip()
    return list(kernels.values())


def run(operation: str, variant: str, context: Context) -> None:
    """Emits a row for each kernel that ncu saw, or one that says why there is none."""
    about: Row = {"kind": "machine", "operation": f"ncu {operation}"}
    ncu = shutil.which("ncu")
    if context.dry or not ncu:
        note = "a dry run has no kernels to profile" if context.dry else "ncu is not on the PATH"
        emit(about | {"ok": None, "note": note})
        return
    REPORTS.mkdir(parents=True, exist_ok=True)
    report = REPORTS / operation
    first = CHECKS[operation][1][0]
    entry = ROOT / "benchmarks" / "run_gpu.py"
    command = [ncu, "--clock-control", "none", "--target-processes", "all", "--force-overwrite"]
    command += [
        "--kernel-name",
        f"regex:^({'|'.join(our_kernels())})$",
        "--launch-count",
        "40",
        "-o",
        str(report),
    ]
    command += ["--metrics", ",".join(_METRICS)]
    command += [sys.executable, str(entry), "--target", "check", operation, first]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).strip().splitlines()
        emit(about | {"ok": None, "note": f"ncu refused: {' '.join(lines[-3:])}"})
        return
    page = [ncu, "--import", f"{report}.ncu-rep", "--csv", "--page", "details"]
    text = subprocess.run(page, capture_output=True, text=True).stdout
    found = _table(text.splitlines())
    for row in found:
        emit(about | row | {"ok": True})
    if not found:
        emit(about | {"ok": None, "note": f"ncu saw no kernel; its report is {report}.ncu-rep"})


def run_alone(kind: str, operation: str, variant: str, *, dry: bool) -> None:
    """In this process, for tools that watch a process: one check, whose row goes nowhere, or the
    launches of an operation's checks."""
    from benchmarks.gpu.harness import check
    from benchmarks.gpu.rows import ROWS_VARIABLE
    from benchmarks.gpu.sanitize import launch

    if kind == "launch":
        launch(operation)
        return
    if kind != "check":
        raise SystemExit(f"run_gpu.py: --target {kind}: choose of check, launch")
    os.environ.setdefault(ROWS_VARIABLE, os.devnull)
    check(operation, variant, Context(dry=dry))
