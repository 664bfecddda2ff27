"""The command line of `make gpu` and `make gpu-again`."""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu import jobs
from benchmarks.gpu.jobs import Job, Phase
from benchmarks.gpu.keep import AGAIN, WHOLE, keep
from benchmarks.gpu.rows import Row, RowFile, failures, read_rows, set_aside
from benchmarks.gpu.runner import Runner, guarded, why_no_build

ROOT = Path(__file__).resolve().parents[2]
# Caches, logs and profiles; never below the output, which should stay small.
BUILD = ROOT / "build" / "gpu"
# The rows of the last whole run on a GPU.
LAST = BUILD / "last.jsonl"
_PR_SET_PDEATHSIG = 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run_gpu.py", description=__doc__)
    parser.add_argument("--out", type=Path, help="where gpu.jsonl goes ($OUT)")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny, kernels interpreted")
    parser.add_argument("--budget", type=float, default=580.0, help="seconds for all of it")
    parser.add_argument("--limit", type=float, help="seconds for a job, where it has more")
    parser.add_argument("--only", default="", help="operations, between commas")
    parser.add_argument("--phases", default="", help="of machine, precompile, check, ...")
    parser.add_argument("--again", action="store_true", help="what failed the last time")
    parser.add_argument("--last", type=Path, help="the rows of the last time, for --again")
    parser.add_argument("--profile", default="", help="operations whose kernels ncu looks at")
    parser.add_argument("--sanitize", default="", help="operations for compute-sanitizer, or all")
    parser.add_argument("--keep", action="store_true", help="the rows of --out, for the report")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--target", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out is None:
        options.out = Path(os.environ.get("OUT") or BUILD / ("dry" if options.dry else "out"))
    return options


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def selected(phases: list[Phase], only: list[str], names: list[str]) -> list[Phase]:
    """The phases of these names, with the jobs of these operations. Raises SystemExit."""
    for kind, given, known in (
        ("--only", only, jobs.OPERATIONS),
        ("--phases", names, tuple(phase.name for phase in phases)),
    ):
        unknown = [word for word in given if word not in known]
        if unknown:
            raise SystemExit(f"run_gpu.py: {kind} {unknown[0]}: choose of {', '.join(known)}")
    chosen = []
    for phase in phases:
        if names and phase.name not in names:
            continue
        kept = phase.jobs
        if only:
            kept = tuple(j for j in kept if phase.name == "machine" or j.operation in only)
        chosen.append(replace(phase, jobs=kept))
    return chosen


def left_out_of(last: list[Row]) -> set[str]:
    """The jobs that a run did not come to, or was at when it was killed."""
    told = [row for row in last if row["operation"] == "left out"]
    if told:  # with this a run ends
        return {name for row in told for name in row["jobs"]}
    planned = {name for row in last if row["operation"] == "planned" for name in row["jobs"]}
    return planned - {row.get("job") for row in last} | {row.get("job") for row in last[-1:]}


def again(phases: list[Phase], last: list[Row]) -> list[Phase]:
    """Of each phase what failed or was left out the last time, and the ceilings.

    Of tests that were cut short all run again, after those that failed.
    """
    failed = failures(last)
    names = {row.get("job") for row in failed}
    names |= left_out_of(last)
    tests = tuple(
        row["variant"] for row in failed if row["kind"] == "test" and "::" in row["variant"]
    )
    chosen = []
    for phase in phases:
        kept = tuple(job for job in phase.jobs if phase.name == "machine" or job.name in names)
        if phase.name == "test" and tests:
            (whole,) = phase.jobs
            command = (*(word for word in whole.command if not word.startswith("tests/")), *tests)
            first = Job("test", whole.operation, "that failed", command=command, limit=whole.limit)
            kept = (first, *kept)
        chosen.append(replace(phase, jobs=kept))
    return chosen


def copies_of(options: argparse.Namespace) -> tuple[Path, ...]:
    """Where rows go too, for `make gpu-again`: those of a whole run on a GPU alone."""
    parts = (
        *(options.again, options.profile, options.sanitize),
        *(options.only, options.phases),
    )
    return () if options.dry or any(parts) else (LAST,)


def row_file(options: argparse.Namespace, name: str) -> RowFile:
    """Where rows go; what is taken again is added to, until the next whole run sets all aside."""
    is_added = name == AGAIN and not options.dry
    for old in () if is_added else dict.fromkeys((name, AGAIN)):
        earlier = set_aside(options.out / old)
        if earlier:
            print(f"the rows of an earlier run are in {earlier}")
    return RowFile(options.out / name, *copies_of(options), keeps=is_added)


def end_with_make() -> None:
    """Has this process end, by SIGTERM, when the make that runs it is killed."""
    if "MAKELEVEL" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> int:
    options = _options()
    if options.serve:
        from benchmarks.gpu.server import serve

        serve()
        return 0
    if options.target:
        from benchmarks.gpu.profile import run_alone

        run_alone(*options.target, dry=options.dry)
        return 0
    if options.keep:
        for path in keep(options.out, ROOT / "benchmarks" / "results"):
            print(path.relative_to(ROOT))
        return 0
    if not (options.dry or list(Path("/dev").glob("nvidia*")) or shutil.which("nvidia-smi")):
        raise SystemExit("run_gpu.py: no NVIDIA GPU here; --dry runs all of it on the CPU")
    phases = jobs.phases(options.dry, os.cpu_count() or 1)
    name = WHOLE
    with_tools = options.profile or options.sanitize
    if options.again or with_tools:
        name = AGAIN
        last = options.last or next(
            (path for path in (options.out / WHOLE, LAST) if path.exists()), LAST
        )
        if not last.exists() and options.again:
            raise SystemExit(f"run_gpu.py: no rows of a last run in {last}: `make gpu` comes first")
        phases = again(phases, read_rows(last)) if options.again else phases[:1]
    phases = selected(phases, words(options.only), words(options.phases))
    if options.profile:
        phases.append(Phase("profile", watched("profile", words(options.profile), "ncu"), 1))
    if options.sanitize:
        names = words(options.sanitize)
        if names == ["all"]:
            names = [name for name in jobs.OPERATIONS if jobs.variants_of_ours(name)]
        phases.append(Phase("sanitize", watched("sanitize", names, "compute-sanitizer"), 8))
    end_with_make()
    rows = row_file(options, name)
    runner = Runner(
        rows,
        BUILD / "scratch",
        BUILD / "cache",
        dry=options.dry,
        budget=options.budget,
        limit=options.limit,
    )
    if options.dry:
        note = "a dry run has no graph capture, no CUDA build and no libraries for GPUs"
        rows.append({"kind": "machine", "operation": "dry run", "ok": None, "note": note})
    wants_build = any(job.after for phase in phases for job in phase.jobs)
    lacking = why_no_build() if wants_build else ""
    if lacking:
        rows.append({"kind": "machine", "operation": "native build", "ok": None, "note": lacking})
    build = wants_build and not lacking
    guarded(runner, lambda: runner.run(phases, jobs.native_builds(options.dry) if build else ()))
    return 1 if failures(rows.rows) else 0


def watched(module: str, operations: list[str], tool: str) -> tuple[Job, ...]:
    """A job for each operation, of a module that has a tool watch it; raises SystemExit for an
    operation that is not there."""
    unknown = [name for name in operations if name not in jobs.OPERATIONS]
    if unknown:
        raise SystemExit(f"run_gpu.py: --{module} {unknown[0]}: choose of {jobs.OPERATIONS}")
    return tuple(
        Job("machine", name, tool, target=f"{module}:run", limit=120.0) for name in operations
    )
