"""Runs the phases within a budget, and writes every row as it comes in."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import Context
from benchmarks.gpu.jobs import Job, Phase
from benchmarks.gpu.pool import Pool, Running
from benchmarks.gpu.rows import Row, RowFile
from benchmarks.gpu.table import line, table
from benchmarks.gpu.targets import targets
from benchmarks.training.variants import ANCHOR, checked

# Kept for what must be killed and said at the end.
_LAST_SECONDS = 5.0


class CutOff(Exception):
    """A signal asked the run to end."""


def environment(cache: Path, dry: bool) -> dict[str, str]:
    """What every process of a run has in common."""
    common = {
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        # What one process timed, the others need not time again.
        "TRITON_CACHE_AUTOTUNING": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        # So that asking for a GPU does not initialise CUDA in the process that forks.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
        "NANOTRON_FAST_BACKEND": "",
    }
    if dry:
        common |= {
            "TRITON_INTERPRET": "1",
            "NANOTRON_FAST_BACKEND": "triton",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
    return common


def why_no_build() -> str:
    """What a native build lacks here; empty where it lacks nothing."""
    missing = [name for name in ("pybind11", "ninja", "setuptools") if find_spec(name) is None]
    if not any(map(shutil.which, ("c++", "g++", "clang++", os.environ.get("CXX") or "c++"))):
        missing.append("a C++ compiler")
    return f"there is no {', no '.join(missing)}" if missing else ""


def forget_times(cache: Path) -> None:
    """Removes what Triton's tuner and Inductor's have timed; what they compiled stays."""
    for name in ("triton/*/*.autotune.json", "inductor/*/*.best_config"):
        for path in cache.glob(name):
            path.unlink()


class Runner:
    """One run. Rows go to `out`; processes and their logs live in `scratch`."""

    def __init__(
        self,
        rows: RowFile,
        scratch: Path,
        cache: Path,
        *,
        dry: bool,
        budget: float,
        limit: float | None = None,
    ) -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        self.rows, self.dry, self.budget, self.cache = rows, dry, budget, cache
        self.limit = float("inf") if limit is None else limit
        self.started = time.monotonic()
        self.ceilings: dict[str, float] = {}
        self._anchors: dict[str, Row] = {}
        self.left_out: list[str] = []
        # What has not begun yet, in order; and of it what waits for a job in the background.
        self.not_begun: list[Job] = []
        self._postponed: list[Job] = []
        self._counts: dict[int, int] = {}
        self._waits: set[str] = set()
        self.pool = Pool(scratch, environment(cache, dry))

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        return self.budget - _LAST_SECONDS - self.elapsed

    def add(self, row: Row) -> None:
        if row["operation"] == "ceilings" and row.get("ok"):
            self.ceilings = {name: row[name] for name in ("copy_gb_per_s", "matmul_tflop_per_s")}
        if row["kind"] == "step":
            row = self._held_to_anchor(row)
        self.rows.append(row)
        if row["ok"] is False or row["operation"] == "phase":
            print(line(row), flush=True)  # the table comes at the end, if the run gets there

    def _held_to_anchor(self, row: Row) -> Row:
        """The row of a step, or a failure where its first one is not transformers'."""
        if row["variant"] == ANCHOR:
            self._anchors[row["operation"]] = row
        return {"job": row["job"]} | checked(row, self._anchors.get(row["operation"], {}))

    def _start(self, job: Job) -> None:
        context = asdict(Context(dry=self.dry, ceilings=self.ceilings))
        self.pool.start(job, min(job.limit, self.limit, self.left), context)
        self.not_begun.remove(job)

    def _collect(self, seconds: float) -> list[Running]:
        """Writes what came in, and gives the jobs that ended."""
        ended = []
        for running, rows in self.pool.poll(seconds):
            for row in rows:
                self.add(row | {"job": running.job.name})
            self._counts[id(running)] = self._counts.get(id(running), 0) + len(rows)
            if running.code is not None:
                self._finish(running, self._counts.pop(id(running)))
                ended.append(running)
        return ended

    def _finish(self, running: Running, num_rows: int) -> None:
        job = running.job
        self._waits.discard(job.operation)
        if running.is_late and running.limit < min(job.limit, self.limit):
            self.left_out.append(job.name)  # the run ended, not the job's own time
            return
        is_failed = running.code != 0
        # pytest says by its code that a test failed, and that is in the test's row.
        if job.kind == "test" and running.code == 1 and num_rows:
            is_failed = False
        is_silent = num_rows == 0 and job.target and not job.target.endswith(":precompile")
        if not (is_failed or is_silent or job.says_when_done):
            return
        row: Row = {"kind": job.kind, "operation": job.operation, "variant": job.variant}
        if job.target.endswith(":precompile"):
            row |= {"operation": "precompile", "variant": f"{job.operation} {job.variant}"}
        is_ok = not (is_failed or is_silent)
        row |= {"ok": is_ok, "seconds": running.seconds, "job": job.name}
        if not row["ok"]:
            row["error"] = running.error or "it ended well, and said nothing"
        self.add(row)

    def run(self, phases: Iterable[Phase], background: Iterable[Job] = ()) -> None:
        """All phases in turn; `background` runs beside them, each once what it is after ended."""
        waiting, phases = list(background), list(phases)
        self._waits |= {job.operation for job in waiting}
        self.not_begun = [*waiting, *(job for phase in phases for job in phase.jobs)]
        # What has been compiled has no row of its own.
        told = [job.name for job in self.not_begun if not job.target.endswith(":precompile")]
        self.add({"kind": "machine", "operation": "planned", "ok": True, "jobs": told})
        for phase in phases:
            if phase.tunes_anew:
                forget_times(self.cache)
            self._run_phase(phase, waiting)
        if self._postponed:  # nothing else is left to do meanwhile
            self._run_phase(Phase("postponed", tuple(self._postponed), 4), waiting, is_last=True)

    def _is_ready(self, job: Job) -> bool:
        return job.after not in self._waits

    def _run_phase(self, phase: Phase, background: list[Job], *, is_last: bool = False) -> None:
        """Runs its jobs, and what earlier ones postponed as soon as that is ready.

        What waits for the background is postponed, where nothing else is left to run.
        """
        begun, pending = self.elapsed, list(phase.jobs)
        others = {job.name for job in background}
        others |= {run.job.name for run in self.pool.running.values()}
        if is_last:
            self._postponed = []
        while True:
            if self.elapsed > phase.until * self.budget or self.left < 1:
                self._leave_out(pending)
                pending = []
            running = [run for run in self.pool.running.values() if run.job.name not in others]
            if not running and not is_last and not any(map(self._is_ready, pending)):
                self._postponed += pending
                break
            if not running and not pending:
                break
            for job in filter(self._is_ready, tuple(background)):
                background.remove(job)
                self._start(job)
            slots = max(phase.workers - len(running), 0)
            ready = list(filter(self._is_ready, (*self._postponed, *pending)))
            for job in ready[:slots]:
                (pending if job in pending else self._postponed).remove(job)
                self._start(job)
            self._collect(0.05)
        if phase.jobs:
            self.add(
                {
                    "kind": "machine",
                    "operation": "phase",
                    "variant": phase.name,
                    "ok": True,
                    "jobs": len(phase.jobs),
                    "seconds": round(self.elapsed - begun, 2),
                    "at_seconds": round(self.elapsed, 2),
                }
            )

    def _leave_out(self, jobs: Iterable[Job]) -> None:
        for job in tuple(jobs):
            self.not_begun.remove(job)
            self.left_out.append(job.name)

    def close(self, why: str = "") -> None:
        """Ends what still runs, and says what was not done."""
        cut_off = list(self.pool.running.values())
        self.pool.stop()
        for running in cut_off:
            for row in running.rows():
                self.add(row | {"job": running.job.name})
            self.left_out.append(running.job.name)
        self._leave_out(self.not_begun)
        self.left_out = list(dict.fromkeys(self.left_out))
        if why:
            self.add({"kind": "machine", "operation": "cut off", "ok": None, "note": why})
        row: Row = {"kind": "machine", "operation": "left out", "ok": True, "note": "nothing"}
        if self.left_out:
            note = f"{len(self.left_out)} jobs for want of time: {'; '.join(self.left_out)}"
            row |= {"ok": None, "note": note}
        self.add(row | {"jobs": self.left_out})  # the last row of all but what was killed
        print(table(self.rows.rows), flush=True)
        if not self.dry and any(row["kind"] in ("ratio", "step") for row in self.rows.rows):
            print("targets", *targets(self.rows.rows), sep="\n", flush=True)


def guarded(runner: Runner, work: Callable[[], Any]) -> None:
    """Runs it, and closes the runner also where a signal or an error ends it."""

    def cut_off(number: int, _: Any) -> None:
        raise CutOff(f"{signal.Signals(number).name} after {runner.elapsed:.0f} s")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, cut_off)
    why = ""
    try:
        work()
    except CutOff as error:
        why = str(error)
    except Exception as error:
        why = f"the runner itself failed: {error!r}"
        raise
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        runner.close(why)
        sys.stdout.flush()
