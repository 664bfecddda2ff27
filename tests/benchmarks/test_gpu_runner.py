"""The order in which jobs run, and what a run's end does to them. Their processes only sleep."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import server
from benchmarks.gpu.jobs import Job, Phase
from benchmarks.gpu.rows import RowFile
from benchmarks.gpu.runner import Runner
from benchmarks.training.variants import ANCHOR

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    """One whose jobs are commands: what they would import is not imported for them."""
    monkeypatch.setenv(server.PRELOAD_VARIABLE, "json")
    runner = Runner(RowFile(tmp_path / "gpu.jsonl"), tmp_path / "s", tmp_path, dry=True, budget=60)
    yield runner
    runner.pool.stop()


def _sleep(name: str, seconds: float, **options: Any) -> Job:
    command = ("sleep", str(seconds))
    return Job("check", name, command=command, says_when_done=True, **options)


def test_what_waits_for_a_build_lets_the_next_phase_begin(runner: Runner) -> None:
    build = _sleep("build", 1)
    waits = (_sleep("waits", 0, after="build"), _sleep("waits too", 0, after="build"))
    phases = [Phase("first", (*waits, _sleep("a", 0)), 2), Phase("second", (_sleep("b", 2),), 1)]
    runner.run([*phases, Phase("third", (_sleep("c", 0),), 1)], [build])
    order = [row["operation"] for row in runner.rows.rows if row["kind"] == "check"]
    assert order == ["a", "build", "b", "waits", "waits too", "c"]
    # Nothing else is left to do: then it is waited for.
    runner.run([Phase("last", (_sleep("z", 0, after="more"),), 1)], [_sleep("more", 0.3)])
    order = [row["operation"] for row in runner.rows.rows if row["kind"] == "check"]
    assert order[-2:] == ["more", "z"]
    assert runner.left_out == []
    planned = [row["jobs"] for row in runner.rows.rows if row["operation"] == "planned"]
    assert planned[1] == ["check more", "check z"]
    runner.close()
    assert runner.rows.rows[-1]["operation"] == "left out"
    assert runner.rows.rows[-1]["jobs"] == []


def test_a_job_that_the_budget_ends_is_left_out_and_no_failure(runner: Runner) -> None:
    jobs = (_sleep("hangs", 60, limit=0.5), _sleep("late", 60), _sleep("next", 60))
    waits = _sleep("waits", 0, after="build")
    runner.budget = runner.elapsed + 8.0  # the last five seconds are for what must be said
    runner.run([Phase("check", (*jobs, waits), 1)], [_sleep("build", 60)])
    runner.close()
    failed = {row["operation"]: row["error"] for row in runner.rows.rows if row["ok"] is False}
    assert failed == {"hangs": "killed after its limit of 0 s"}
    names = {"check late", "check next", "check waits", "check build"}
    assert set(runner.left_out) == names
    assert len(runner.left_out) == len(names)
    assert runner.rows.rows[-1]["jobs"] == runner.left_out


def test_what_cannot_be_killed_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[dict[str, Any]] = []
    clock = [100.0]
    monkeypatch.setattr(server, "_answer", lambda **fields: answers.append(fields))
    monkeypatch.setattr(server, "kill_group", lambda pid: None)
    monkeypatch.setattr(server.os, "waitpid", lambda pid, options: (0, 0))
    monkeypatch.setattr(server.time, "monotonic", lambda: clock[0])
    children = {1: server.Child(7, started=100.0, limit=20.0)}
    for clock[0], left in ((119.0, [1]), (121.0, [1]), (129.0, [1]), (131.0, [])):
        server._reap(children)
        assert [*children] == left
    assert answers == [{"number": 7, "code": -9, "is_late": True, "seconds": 31.0}]


def test_what_was_timed_beside_others_is_timed_anew(runner: Runner, tmp_path: Path) -> None:
    kept = [tmp_path / "triton" / "A" / "kernel.cubin", tmp_path / "inductor" / "ab" / "cab.py"]
    timed = [kept[0].with_name("kernel.autotune.json"), kept[1].with_name("c.best_config")]
    for path in (*kept, *timed):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    runner.run([Phase("first", (_sleep("a", 0),), 1)])
    assert all(path.exists() for path in (*kept, *timed))
    runner.run([Phase("second", (_sleep("b", 0),), 1, tunes_anew=True)])
    assert [path.exists() for path in (*kept, *timed)] == [True, True, False, False]


def test_a_step_that_is_not_transformers_has_no_time(runner: Runner) -> None:
    about = {"kind": "step", "operation": "1B", "ok": True, "first_loss": 9.0, "first_norm": 2.0}
    timed = [
        about | {"variant": "ours", "first_loss": 9.5, "p50_ms": 0.5},  # nothing to hold it to yet
        about | {"variant": ANCHOR, "p50_ms": 2.0},
        about | {"variant": "ours", "p50_ms": 1.0},
        about | {"variant": "Liger", "first_norm": 2.5, "p50_ms": 1.0},
        about | {"variant": "ours", "operation": "3B", "first_loss": 9.5, "p50_ms": 3.0},
        {"kind": "step", "operation": "1B", "variant": "ours", "ok": False, "error": "killed"},
    ]
    for row in timed:
        runner.add(row | {"job": "step"})
    found = [row.get("p50_ms", row.get("error")) for row in runner.rows.rows]
    assert found == [0.5, 2.0, 1.0, found[3], 3.0, "killed"]
    assert found[3].startswith("first_norm 2.5, transformers has 2: ")
    assert all(row["job"] == "step" for row in runner.rows.rows)


def test_what_had_not_begun_when_a_run_was_cut_off_is_named(runner: Runner) -> None:
    runner.not_begun = [_sleep("a", 0), _sleep("b", 0)]
    runner.close("SIGTERM after 1 s")
    assert runner.rows.rows[-1]["jobs"] == ["check a", "check b"]


def test_a_run_ends_with_the_make_that_began_it(tmp_path: Path) -> None:
    code = (
        f"import sys, time; sys.path.append({str(ROOT)!r})\n"
        "from benchmarks.gpu.main import end_with_make\n"
        "end_with_make(); print('ready', flush=True); time.sleep(60)"
    )
    (tmp_path / "run.py").write_text(code)
    (tmp_path / "Makefile").write_text(f"all:\n\t{sys.executable} -S run.py\n")
    process = subprocess.Popen(
        ["make", "-s", "-C", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"MAKEFLAGS": ""},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    # The pipe ends with its last writer, which is the run below make.
    assert process.stdout.read() == ""
    process.wait()
