"""`make gpu` where kernels are interpreted: planted faults, a run that is cut off, and its rows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import jobs

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("benchmarks", "kernels", "nanotron_fast")


def plant(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path} has {text.count(old)} of {old!r}"
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a run needs, with faults in three kernels; nothing of it is installed."""
    folder = tmp_path_factory.mktemp("tree")
    for part in PARTS:
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
        shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=ignored)
    kernels = folder / "kernels"
    plant(kernels / "glu.py", "(dy * activated).to(dtype)", "(-dy * activated).to(dtype)")
    plant(
        kernels / "optimizer" / "accumulate.py",
        '    check_lists("accumulate_"',
        '    __import__("time").sleep(60)\n    check_lists("accumulate_"',
    )
    plant(
        kernels / "rms_norm" / "__init__.py",
        "import torch\n",
        "import a_module_that_is_not_there\n",
    )
    return folder


def command(tree: Path, *options: str) -> list[str]:
    script = str(tree / "benchmarks" / "run_gpu.py")
    return [sys.executable, script, "--dry", "--out", str(tree / "out"), *options]


def environment(tree: Path) -> dict[str, str]:
    # Before what is installed, so that the copy's kernels run and not those of the checkout.
    return os.environ | {"PYTHONPATH": str(tree)}


def checked(tree: Path, names: str, *options: str) -> tuple[list[dict[str, Any]], str]:
    """The rows of these operations' checks and what was printed, of a run that must fail."""
    done = subprocess.run(
        command(tree, "--phases", "check", "--only", names, *options),
        env=environment(tree),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    rows = [json.loads(line) for line in (tree / "out" / "gpu.jsonl").read_text().splitlines()]
    checks = [row for row in rows if row["kind"] == "check"]
    assert {row["operation"] for row in checks} == set(names.split(","))
    return checks, done.stdout


@pytest.mark.slow
def test_planted_faults_are_the_failures_of_their_operations(tree: Path) -> None:
    """A wrong sign and a file that does not import: everything else still runs."""
    rows, printed = checked(tree, "rms_norm,glu,rope_apart")
    for row in rows:
        assert row["ok"] is (row["operation"] == "rope_apart"), row
        if row["operation"] in ("glu", "rope_apart"):
            # One that is cut off at its limit has none of this.
            assert row.get("path") == "triton", row
            assert row["kernels"]
        if row["operation"] == "glu":
            assert row["error"].startswith("gradient 0 is off by")
        if row["operation"] == "rms_norm":
            assert "a_module_that_is_not_there" in row["error"]
    assert "FAILED   glu silu" in printed


@pytest.mark.slow
def test_a_kernel_that_hangs_is_killed_and_the_others_run(tree: Path) -> None:
    """The limit is short; on a busy machine it may cut off a sound check, too."""
    rows, _ = checked(tree, "accumulate,rms_norm,clip", "--limit", "6")
    for row in rows:
        if row["operation"] == "accumulate":
            assert not row["ok"]
        if row["operation"] == "accumulate" and row["variant"] != "compiled":
            assert "killed after its limit of 6 s" in row["error"]


@pytest.mark.slow
def test_a_run_that_is_cut_off_leaves_whole_lines_and_no_process(tree: Path) -> None:
    earlier = '{"operation": "of an hour ago"}\n'
    (tree / "cut").mkdir()
    (tree / "cut" / "gpu.jsonl").write_text(earlier)
    process = subprocess.Popen(
        command(tree, "--phases", "check", "--only", "attention,clip", "--out", str(tree / "cut")),
        env=environment(tree),
        stdout=subprocess.PIPE,
        text=True,
    )
    path = tree / "cut" / "gpu.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and '"check"' not in (
        path.read_text() if path.exists() else ""
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert (tree / "cut" / "gpu.1.jsonl").read_text() == earlier
    assert printed.startswith(f"the rows of an earlier run are in {tree / 'cut' / 'gpu.1.jsonl'}\n")
    text = path.read_text()
    assert text.endswith("\n")
    rows = [json.loads(line) for line in text.splitlines()]
    cut_off = next(row for row in rows if row["operation"] == "cut off")
    assert cut_off["note"].startswith("SIGTERM after")
    left_out = next(row for row in rows if row["operation"] == "left out")
    names = {job.name for job in jobs.correctness(True) if job.operation in ("attention", "clip")}
    ended = {row["job"] for row in rows if row["kind"] == "check"}
    assert set(left_out["jobs"]) >= names - ended
    assert f"{len(rows)} rows" in printed
    # What ran below it has ended too: nobody else's environment names this tree.
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            assert str(tree).encode() not in entry.read_bytes(), entry
        except OSError:
            continue
