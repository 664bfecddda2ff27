"""What a sweep times, what it takes for faster, and the file that it writes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import sweep
from benchmarks.gpu.cases.case import Setting
from benchmarks.gpu.cases.registry import MODULES, cases_of
from benchmarks.gpu.rows import ROWS_VARIABLE, read_rows
from nanotron_fast.kernels.embedding.operators import _GatherBlocks
from nanotron_fast.kernels.runtime import tuning

ROOT = Path(__file__).resolve().parents[2]


def test_every_tuned_operation_is_swept_in_the_order_of_its_worth() -> None:
    assert tuple(sweep.SWEPT) == tuning.OPERATIONS
    assert {case for case, _, _ in sweep.SWEPT.values()} <= set(MODULES)
    (_, _, tuned) = sweep.phases([], dry=False, cpus=4)
    assert [job.operation for job in tuned.jobs] == list(tuning.OPERATIONS)


@pytest.mark.parametrize("operation", sweep.SWEPT)
def test_a_case_has_the_variant_that_is_swept(operation: str) -> None:
    name, phase, variant = sweep.SWEPT[operation]
    fields = (torch.device("meta"), torch.bfloat16, torch.bfloat16, "real", {})
    swept = Setting(*fields).to_sweep()
    found = [case for case in cases_of(name, swept) if {variant} & {*case.variants, *case.absent}]
    assert found
    assert phase in ("forward", "backward", "forward + backward")


def test_an_operation_that_is_none_is_refused() -> None:
    with pytest.raises(SystemExit, match="--only glue: choose of attention_order, "):
        sweep.phases(["glue"], dry=True, cpus=1)


def test_rows_and_entries_are_two_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--dry", "--out", str(tmp_path / "x.jsonl")])
    with pytest.raises(SystemExit, match="that is where the rows go"):
        sweep.main()
    assert not list(tmp_path.iterdir())


def test_a_folder_is_where_the_file_goes(tmp_path: Path, monkeypatch) -> None:
    class Found(Exception):
        pass

    def sweep_file(out: Path, *, dry: bool) -> None:
        raise Found(out)

    monkeypatch.setattr(sweep, "SweepFile", sweep_file)
    monkeypatch.setattr(sweep, "end_with_make", lambda: None)
    for given, expected in (
        (tmp_path, tmp_path / "tuned.json"),
        (tmp_path / "none yet", tmp_path / "none yet" / "tuned.json"),
        (tmp_path / "x.json", tmp_path / "x.json"),
    ):
        monkeypatch.setattr(sys, "argv", ["sweep.py", "--dry", "--out", str(given)])
        with pytest.raises(Found) as found:
            sweep.main()
        assert found.value.args == (expected,)


def test_the_sweeper_imports_neither_torch_nor_triton() -> None:
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); import benchmarks.gpu.sweep\n"
        "assert not {'torch', 'triton', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_faster_is_by_more_than_noise() -> None:
    from benchmarks.gpu.timing import Times
    from benchmarks.gpu.tune import _entries, is_faster

    def times(p50: float, spread: float = 0.0) -> Times:
        return Times(p50 - spread / 2, p50, p50 + spread / 2, "graph")

    assert is_faster(times(0.97), times(1.0))
    assert not is_faster(times(0.99), times(1.0))
    assert not is_faster(times(0.97), times(1.0, spread=0.1))
    rule, better, mixed = _GatherBlocks(4096, 4), _GatherBlocks(2048, 4), _GatherBlocks(8192, 8)
    of_cases = [
        {rule: times(1.0), better: times(0.9), mixed: times(0.5)},
        {rule: times(2.0), better: times(1.9), mixed: times(2.1)},
    ]
    key = {"cols": 1, "itemsize": 2}
    assert [*_entries(key, of_cases, is_certain=False)] == [
        {"key": key, "config": {"elements": 2048, "num_warps": 4}, "times_as_fast": 1.053}
    ]
    assert [*_entries(key, [{rule: times(1.0), better: times(0.99)}], is_certain=False)] == []


def test_what_does_not_fit_on_the_gpu_is_no_entry(monkeypatch) -> None:
    """Triton's tuner gives it a time that is infinite."""
    from benchmarks.gpu import tune
    from benchmarks.gpu.context import Context
    from nanotron_fast.kernels.attention.configs import FORWARD, ForwardBlocks
    from nanotron_fast.kernels.attention.kernels.forward import forward_kernel

    too_large, fast, slow = FORWARD[128]
    timings = {too_large: [math.inf] * 3, fast: [2.0, 1.9, 2.1], slow: [3.0, 2.9, 3.1]}
    monkeypatch.setattr(forward_kernel, "configs_timings", timings, raising=False)
    times = tune._by_triton(ForwardBlocks, "attention_forward", Context())
    assert [*times] == [ForwardBlocks.of(slow), ForwardBlocks.of(fast)]
    (entry,) = tune._entries({"block_d": 128}, [times], is_certain=True)
    assert ForwardBlocks(**entry["config"]).config().all_kwargs() == fast.all_kwargs()
    assert entry["times_as_fast"] == 1.5


def test_ways_take_turns_and_what_cannot_be_captured_is_profiled(monkeypatch) -> None:
    """Where there is no GPU its stream, captures and replays are stand-ins."""
    from benchmarks.gpu import timing
    from benchmarks.gpu.context import Context

    way, replayed = [""], []

    def captured(work: Any, stream: Any) -> tuple[str, int, float]:
        if way[0] == "library":
            raise RuntimeError("no graph of this")
        return way[0], 2, 100.0

    def replay(graph: str, times: int) -> list[float]:
        replayed.append(graph)
        return [9.0, {"rule": 4.0, "candidate": 2.0}[graph]]

    @contextmanager
    def inside(name: str) -> Iterator[None]:
        way[0] = name
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda _: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "_captured", captured)
    monkeypatch.setattr(timing, "_replay", replay)
    monkeypatch.setattr(timing, "_profiled", lambda work: [3.0])
    names = ("rule", "library", "candidate")
    found = timing.beside(lambda: [print], [partial(inside, name) for name in names], Context())
    assert [times.p50_ms for times in found] == [2.0, 3.0, 1.0]
    assert [times.method for times in found] == ["graph", "profiler (no graph of this)", "graph"]
    assert replayed == ["rule", "candidate"] * 8


MACHINE = {
    "kind": "machine",
    "operation": "versions",
    "ok": True,
    "capability": "9.0",
    **dict.fromkeys(("gpu", "date", "commit", "torch", "triton"), "x"),
}


def _swept(operation: str, *entries: Any, is_whole: bool = True) -> dict[str, Any]:
    row = {"kind": "tune", "operation": operation, "ok": True, "entries": [*entries]}
    return row | {"is_whole": is_whole}


def test_a_file_keeps_what_another_sweep_of_the_machine_found() -> None:
    first = sweep.document_of([MACHINE, _swept("rope", 1), _swept("adamw", 2)], {}, dry=False)
    assert first["architecture"] == "sm_90"
    assert first["entries"] == {"adamw": [2], "rope": [1]}
    second = sweep.document_of([MACHINE, _swept("rope"), _swept("pack", 3)], first, dry=False)
    assert second["entries"] == {"adamw": [2], "pack": [3]}
    assert [run["operations"] for run in second["runs"]] == [["rope", "adamw"], ["rope", "pack"]]
    other = MACHINE | {"capability": "8.0"}
    assert sweep.document_of([other, _swept("pack", 4)], first, dry=False)["entries"] == {
        "pack": [4]
    }
    by_hand = {"architecture": "sm_90", "entries": {"adamw": [5]}}  # all that kernels read
    third = sweep.document_of([MACHINE, _swept("pack", 3)], by_hand, dry=False)
    assert third["entries"] == {"adamw": [5], "pack": [3]}
    assert "dry" not in first
    assert sweep.document_of([MACHINE], first, dry=True)["entries"] == {}


def test_an_operation_that_was_cut_off_keeps_its_other_entries() -> None:
    narrow, wide, widest = ({"key": {"cols": cols}} for cols in (64, 128, 256))
    before = {"architecture": "sm_90", "entries": {"rope": [narrow | {"at": 1}, wide | {"at": 1}]}}
    rows = [MACHINE, *(_swept("rope", wide | {"at": 2}, is_whole=False) for _ in range(2))]
    cut_off = sweep.document_of(rows, before, dry=False)
    assert cut_off["entries"] == {"rope": [narrow | {"at": 1}, wide | {"at": 2}]}
    assert cut_off["runs"][0]["operations"] == []
    whole = sweep.document_of([*rows, _swept("rope", widest)], before, dry=False)
    assert whole["entries"] == {"rope": [widest]}
    assert whole["runs"][0]["operations"] == ["rope"]


def test_what_was_found_is_in_the_file_at_once(tmp_path: Path) -> None:
    """A run that is killed has it, and rows of an earlier run stay."""
    for operation in ("rope", "pack"):
        rows = sweep.SweepFile(tmp_path / "sm_90.json", dry=False)
        rows.append(MACHINE)
        rows.append(_swept(operation, {"key": {}}))
        document = json.loads((tmp_path / "sm_90.json").read_text())
        assert document["runs"][-1]["operations"] == [operation]
    assert document["entries"] == {"rope": [{"key": {}}], "pack": [{"key": {}}]}
    assert [row["operation"] for row in read_rows(tmp_path / "sm_90.jsonl")] == [
        *("versions", "rope", "versions", "pack")
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sm_90.json", "sm_90.jsonl"]


@pytest.mark.parametrize("text", ["", '{"entries": {"rope"', "[1]", '{"entries": [1]}'])
def test_another_file_is_not_written_over(tmp_path: Path, text: str) -> None:
    out = tmp_path / "x.json"
    out.write_text(text)
    with pytest.raises(SystemExit, match=r"--out .*x\.json: not a file of measured entries: "):
        sweep.SweepFile(out, dry=False)
    assert out.read_text() == text
    assert list(tmp_path.iterdir()) == [out]


def test_nothing_is_swept_on_a_machine_that_is_not_known(tmp_path: Path, monkeypatch) -> None:
    ran: list[str] = []

    class Failing:
        def __init__(self, rows: Any, *_: Any, **__: Any) -> None:
            self.rows = rows

        def run(self, phases: Any) -> None:
            ran.extend(phase.name for phase in phases)
            self.rows.append({"kind": "machine", "operation": "versions", "ok": False})

        def close(self, why: str) -> None:
            pass

    monkeypatch.setattr(sweep, "Runner", Failing)
    monkeypatch.setattr(sweep, "guarded", lambda runner, work: work())
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--dry", "--out", str(tmp_path / "x.json")])
    with pytest.raises(SystemExit, match="nothing is known of this machine"):
        sweep.main()
    assert ran == ["machine"]
    assert not (tmp_path / "x.json").exists()


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(ROWS_VARIABLE, str(tmp_path / "rows.jsonl"))
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "triton")
    yield tmp_path / "rows.jsonl"
    tuning.forget()


def test_a_candidate_that_is_wrong_gets_no_time(rows: Path, monkeypatch) -> None:
    """Planted: the wrong one is refused by the check of results, the others are timed."""
    from benchmarks.gpu import tune
    from benchmarks.gpu.context import Context

    disagreement, wrong = tune.disagreement, _GatherBlocks(2048, 4)

    def planted(*given: Any) -> float:
        error = disagreement(*given)
        return 1.0 if _GatherBlocks.chosen(cols=32, itemsize=2) == wrong else error

    monkeypatch.setattr(tune, "disagreement", planted)
    tune.run("embedding_gather", "", Context(dry=True))
    *timed, last = read_rows(rows)
    failed = [row for row in timed if not row["ok"]]
    assert [row["error"] for row in failed] == [f"{wrong} is off by 1 of the norm"]
    configs = [row["config"] for row in timed if "config" in row]
    assert configs == [str(_GatherBlocks(*each)) for each in ((4096, 4), (4096, 8), (8192, 8))]
    assert last["operation"] == "embedding_gather"
    assert len(last["entries"]) <= 1


def test_a_candidate_that_does_not_fit_is_left_out(rows: Path, monkeypatch) -> None:
    """Planted: one takes more shared memory than there is; the others are timed."""
    from triton.runtime.errors import OutOfResources

    from benchmarks.gpu import tune
    from benchmarks.gpu.context import Context

    disagreement, too_large = tune.disagreement, _GatherBlocks(2048, 4)

    def planted(*given: Any) -> float:
        if _GatherBlocks.chosen(cols=32, itemsize=2) == too_large:
            raise OutOfResources(300000, 232448, "shared memory")
        return disagreement(*given)

    monkeypatch.setattr(tune, "disagreement", planted)
    tune.run("embedding_gather", "", Context(dry=True))
    left_out, *timed, _, _ = read_rows(rows)
    assert left_out["ok"] is None
    assert left_out["note"].startswith(f"{too_large}: out of resource: shared memory")
    assert [row["ok"] for row in timed] == [True] * 3


def test_what_fails_costs_the_others_nothing(rows: Path, monkeypatch) -> None:
    """Planted: a candidate that does not compile, and a case that has no memory."""
    from benchmarks.gpu import tune
    from benchmarks.gpu.context import Context

    cases, disagreement = tune._cases, tune.disagreement

    def planted(*given: Any) -> float:
        if _GatherBlocks.chosen(cols=32, itemsize=2) == _GatherBlocks(2048, 4):
            raise RuntimeError("PassManager::run failed")
        return disagreement(*given)

    def no_memory() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def with_one_more(*given: Any) -> Any:
        first, *_ = found = [*cases(*given)]
        return [replace(first, shape="too large", tensors=no_memory), *found]

    monkeypatch.setattr(tune, "disagreement", planted)
    monkeypatch.setattr(tune, "_cases", with_one_more)
    tune.run("embedding_gather", "", Context(dry=True))
    case, candidate, *timed, so_far, last = read_rows(rows)
    assert (case["variant"], case["ok"]) == ("too large", False)
    assert case["error"].endswith("CUDA out of memory")
    assert candidate["ok"] is False
    assert "_GatherBlocks(elements=2048, num_warps=4)" in candidate["error"]
    assert candidate["error"].endswith("PassManager::run failed")
    assert [row["ok"] for row in timed] == [True] * 3
    assert so_far["entries"] == last["entries"]
    assert [so_far["is_whole"], last["is_whole"]] == [False, False]


def test_a_case_gets_the_times_of_its_own_kind(rows: Path, monkeypatch) -> None:
    """Of a case, another one and then the first again, of which Triton's tuner asks its memory."""
    from benchmarks.gpu import tune
    from benchmarks.gpu.context import Context
    from nanotron_fast.kernels.matmul import kernels, matmul_glu

    tuner = kernels.glu_kernel
    fast, slow = kernels._config(32, 64, 32, 1, 4), kernels._config(16, 64, 32, 1, 4)

    def timed(*args: Any, config: Any, **meta: Any) -> list[float]:
        return [tuner.nargs["num_k"] * (1.0 if config is fast else 2.0)] * 3

    for name, value in {
        "configs": [fast, slow],
        "early_config_prune": None,
        "cache": {},
        "cache_results": False,
        "configs_timings": {},
        "_bench": timed,
    }.items():
        monkeypatch.setattr(tuner, name, value, raising=False)

    def works(case: Any, *_: Any) -> Any:
        x, weight = torch.randn(4, case.depth), torch.randn(8, case.depth)
        return {"forward": lambda: [partial(matmul_glu, x, weight)]}

    cases = [SimpleNamespace(shape=str(k), depth=k, variants={"ours, fused": None}) for k in (8, 4)]
    monkeypatch.setattr(tune, "_cases", lambda *_: [*cases, cases[0]])
    monkeypatch.setattr(tune, "works_of", works)
    tune.run("matmul_glu", "", Context())
    *all_rows, last = read_rows(rows)
    timed_rows = [row for row in all_rows if "config" in row]
    found = [(row["variant"], row["num_k"], row["p50_ms"]) for row in timed_rows]
    of_first, of_second = [("8", 8, 16.0), ("8", 8, 8.0)], [("4", 4, 8.0), ("4", 4, 4.0)]
    assert found == [*of_first, *of_second, *of_first]
    assert [entry["config"]["block_m"] for entry in last["entries"]] == [32, 32]


@pytest.mark.slow
def test_a_dry_sweep_writes_a_file_that_is_refused(tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "tuned.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "sweep.py"), "--dry", "--out", str(out)]
    done = subprocess.run(
        [*command, "--only", "accumulate,embedding_gather,attention_dq"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    document = json.loads(out.read_text())
    assert document["dry"] is True
    assert document["runs"][0]["operations"] == ["attention_dq", "accumulate", "embedding_gather"]
    assert "accumulate" in done.stdout
    rows = read_rows(out.with_suffix(".jsonl"))
    assert sum(row["kind"] == "tune" and "config" in row for row in rows) == 9
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, str(out))
    tuning.forget()
    with pytest.raises(ValueError, match=r"tuned\.json: is of a dry run"):
        _GatherBlocks.chosen(cols=32, itemsize=2)
    monkeypatch.undo()
    tuning.forget()
