"""`make gpu` where kernels are interpreted: planted faults, a run that is cut off, and its rows."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("benchmarks", "kernels", "nanotron_fast")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a run needs, to plant faults in; nothing of it is installed."""
    for part in PARTS:
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
        shutil.copytree(ROOT / part, tmp_path / part, symlinks=True, ignore=ignored)
    return tmp_path


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The runner's modules, which import neither torch nor triton."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    return importlib.import_module("benchmarks.gpu.main")


def command(tree: Path, *options: str) -> list[str]:
    script = str(tree / "benchmarks" / "run_gpu.py")
    return [sys.executable, script, "--dry", "--out", str(tree / "out"), *options]


def environment(tree: Path) -> dict[str, str]:
    # Before what is installed, so that the copy's kernels run and not those of the checkout.
    return os.environ | {"PYTHONPATH": str(tree)}


def plant(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path} has {text.count(old)} of {old!r}"
    path.write_text(text.replace(old, new))


@pytest.mark.slow
def test_planted_faults_are_the_failures_of_their_operations(tree: Path) -> None:
    plant(
        tree / "kernels" / "swiglu.py", "(dy * activated).to(dtype)", "(-dy * activated).to(dtype)"
    )
    plant(
        tree / "kernels" / "optimizer.py",
        "    grad = tl.load(grad_ptr + offsets",
        "    while True:\n        pass\n    grad = tl.load(grad_ptr + offsets",
    )
    names = "glu,accumulate,rope_apart,column_linear"
    options = ("--phases", "check", "--only", names, "--limit", "8")
    done = subprocess.run(
        command(tree, *options), env=environment(tree), capture_output=True, text=True, timeout=300
    )
    rows = [json.loads(line) for line in (tree / "out" / "gpu.jsonl").read_text().splitlines()]
    checks = {(r["operation"], r["variant"]): r for r in rows if r["kind"] == "check"}
    assert done.returncode == 1, done.stderr
    assert {operation for operation, _ in checks} == set(names.split(","))
    for (operation, _), row in checks.items():
        assert row["ok"] is (operation in ("rope_apart", "column_linear")), row
        if operation in ("glu", "rope_apart"):
            assert row["path"] == "triton"
            assert row["kernels"]
        if operation == "glu":
            assert row["error"].startswith("gradient 0 is off by")
        if operation == "accumulate":
            assert "killed after its limit of 8 s" in row["error"]
    assert "FAILED   glu silu" in done.stdout


@pytest.mark.slow
def test_a_run_that_is_cut_off_leaves_whole_lines_and_no_process(tree: Path) -> None:
    process = subprocess.Popen(
        command(tree, "--phases", "check", "--only", "attention,clip"),
        env=environment(tree),
        stdout=subprocess.PIPE,
        text=True,
    )
    path = tree / "out" / "gpu.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and '"check"' not in (
        path.read_text() if path.exists() else ""
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    text = path.read_text()
    assert text.endswith("\n")
    rows = [json.loads(line) for line in text.splitlines()]
    cut_off = next(row for row in rows if row["operation"] == "cut off")
    assert cut_off["note"].startswith("SIGTERM after")
    left_out = next(row for row in rows if row["operation"] == "left out")
    assert "check attention" in left_out["note"] or "check clip" in left_out["note"]
    assert f"{len(rows)} rows" in printed
    # What ran below it has ended too: nobody else's environment names this tree.
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            assert str(tree).encode() not in entry.read_bytes(), entry
        except OSError:
            continue


def test_the_runner_imports_neither_torch_nor_triton() -> None:
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); import benchmarks.gpu.main\n"
        "assert not {'torch', 'triton', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_half_a_line_is_no_row_yet(modules: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    tail = importlib.import_module("benchmarks.gpu.rows").Tail(path)
    assert tail() == []
    path.write_bytes(b'{"a": 1}\n{"a":')
    assert tail() == [{"a": 1}]
    with path.open("ab") as file:
        file.write(b" 2}\n")
    assert tail() == [{"a": 2}]


def test_every_operation_has_checks_and_a_time(modules: ModuleType) -> None:
    jobs = importlib.import_module("benchmarks.gpu.jobs")
    for is_dry, least in ((True, 40), (False, 100)):
        of_phase = {phase.name: phase.jobs for phase in jobs.phases(is_dry, 2)}
        assert {job.operation for job in of_phase["check"]} == set(jobs.OPERATIONS)
        assert len(of_phase["check"]) >= least
        assert [job.operation for job in of_phase["ratio"]] == list(jobs.OPERATIONS)
        assert len({job.name for jobs in of_phase.values() for job in jobs}) == sum(
            map(len, of_phase.values())
        )


def test_again_takes_what_failed(modules: ModuleType) -> None:
    phases = modules.jobs.phases(True, 2)
    last = [
        {"kind": "check", "operation": "glu", "ok": False, "job": "check glu silu"},
        {"kind": "check", "operation": "clip", "ok": True, "job": "check clip clips"},
        {"kind": "test", "operation": "test_a", "variant": "tests/a.py::test_a", "ok": False},
    ]
    chosen = {phase.name: phase.jobs for phase in modules.again(phases, last)}
    assert [job.name for job in chosen["check"]] == ["check glu silu"]
    assert chosen["test"][0].command[-1] == "tests/a.py::test_a"
    assert [job.operation for job in chosen["machine"]] == ["versions", "ceilings"]
    assert chosen["ratio"] == ()


@pytest.mark.parametrize(("only", "names"), [(["gul"], []), ([], ["checks"])])
def test_a_name_that_is_none_is_refused(
    modules: ModuleType, only: list[str], names: list[str]
) -> None:
    with pytest.raises(SystemExit, match="choose of"):
        modules.selected(modules.jobs.phases(True, 2), only, names)
