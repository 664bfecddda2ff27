"""What a run of `make gpu` consists of, in which order, and what is kept of it."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.gpu import jobs
from benchmarks.gpu.main import again, copies_of, selected
from benchmarks.gpu.rows import ROWS_VARIABLE, RowFile, Tail, read_rows, set_aside
from benchmarks.training.shapes import SETTINGS
from benchmarks.training.variants import NEEDS

ROOT = Path(__file__).resolve().parents[2]


def test_the_runner_imports_neither_torch_nor_triton() -> None:
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); import benchmarks.gpu.main\n"
        "assert not {'torch', 'triton', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_a_copy_without_a_repository_is_told_its_commit(tmp_path: Path, monkeypatch) -> None:
    from benchmarks.gpu import machine

    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    monkeypatch.delenv("COMMIT", raising=False)
    assert machine.commit() == "unknown"
    monkeypatch.setenv("COMMIT", "1234567")
    assert machine.commit() == "1234567"


def test_half_a_line_is_no_row_yet(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    tail = Tail(path)
    assert tail() == []
    path.write_bytes(b'{"a": 1}\n{"a":')
    assert tail() == [{"a": 1}]
    with path.open("ab") as file:
        file.write(b" 2}\n")
    assert tail() == [{"a": 2}]


def test_rows_of_a_run_on_a_gpu_are_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    assert set_aside(path) is None
    for run in range(3):
        RowFile(path).append({"run": run})
        assert set_aside(path) == tmp_path / f"gpu.{run + 1}.jsonl"
    path.touch()
    assert set_aside(path) is None  # a run that was ended before its first row
    assert [read_rows(tmp_path / f"gpu.{run}.jsonl") for run in (1, 2, 3)] == [
        [{"run": run}] for run in range(3)
    ]


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("{\n}\n")
    with pytest.raises(SystemExit, match="notes: not a file of rows: "):
        read_rows(tmp_path / "notes")


def test_every_operation_has_checks_and_a_time() -> None:
    for is_dry, least in ((True, 40), (False, 100)):
        of_phase = {phase.name: phase.jobs for phase in jobs.phases(is_dry, 2)}
        assert {job.operation for job in of_phase["check"]} == set(jobs.OPERATIONS)
        assert len(of_phase["check"]) >= least
        # Each operation has its first time before any has its second.
        first = of_phase["ratio"][: len(jobs.OPERATIONS)]
        assert [(job.operation, job.variant) for job in first] == [
            (operation, "ours") for operation in jobs.OPERATIONS
        ]
        cases = [job for job in of_phase["ratio"] if job.variant.startswith("case")]
        assert len({job.operation for job in cases[:4]}) == 4
        every = [job.name for chosen in of_phase.values() for job in chosen]
        assert len(set(every)) == len(every)


def test_a_step_of_ours_is_timed_beside_what_users_have() -> None:
    (beside,) = [phase for phase in jobs.phases(False, 16) if phase.name == "beside"]
    names = [job.name for job in beside.jobs]
    assert names[:3] == [
        f"step 1B, 4k tokens {side}"
        for side in ("transformers, SDPA", "ours", "transformers, Liger")
    ]
    assert {job.operation for job in beside.jobs} <= set(SETTINGS)
    assert {job.variant for job in beside.jobs} == {
        name for name, packages in NEEDS.items() if packages[0] == "transformers"
    }
    assert beside.workers == 1


def test_what_a_side_lacks_is_said_before_it_is_imported(tmp_path: Path, monkeypatch) -> None:
    from benchmarks.gpu import beside
    from benchmarks.gpu.context import Context
    from benchmarks.training import variants

    monkeypatch.setattr(variants, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "benchmarks.training.row", None)
    monkeypatch.setenv(ROWS_VARIABLE, str(tmp_path / "rows"))
    beside.run("1B, 4k tokens", "ours", Context(dry=True))
    (row,) = read_rows(tmp_path / "rows")
    assert (row["ok"], row["note"]) == (None, "transformers is not installed")


def test_only_what_can_be_captured_waits_for_the_build_with_cuda() -> None:
    (captured,) = [job for job in jobs.correctness(False) if job.name == "check pack captured"]
    assert jobs.variant_of("pack", "captured") == "cuda qkv"
    assert captured.after == "native build with CUDA"
    assert jobs.variant_of("pack", "compiled") == "triton qkv"
    assert jobs.variant_of("glu", "captured") == "silu"
    # A library that is not deterministic is to be passed over.
    assert jobs.variant_of("attention", "deterministic") == "auto dense"


def test_again_takes_what_failed_and_what_was_left_out() -> None:
    phases = jobs.phases(True, 2)
    left_out = ["check glu gelu", "ratio clip ours", "test pytest"]
    last = [
        {"kind": "check", "operation": "glu", "ok": False, "job": "check glu silu"},
        {"kind": "check", "operation": "clip", "ok": True, "job": "check clip clips"},
        {"kind": "test", "operation": "test_a", "variant": "tests/a.py::test_a", "ok": False},
        {"kind": "machine", "operation": "left out", "ok": None, "jobs": left_out},
    ]
    chosen = {phase.name: phase.jobs for phase in again(phases, last)}
    assert [job.name for job in chosen["check"]] == ["check glu silu", "check glu gelu"]
    failed, whole = chosen["test"]
    assert failed.command[-1] == "tests/a.py::test_a"
    assert whole.name == "test pytest"
    assert [job.operation for job in chosen["machine"]] == ["versions", "ceilings"]
    assert [job.name for job in chosen["ratio"]] == ["ratio clip ours"]


def test_again_takes_what_a_run_that_was_killed_had_not_come_to() -> None:
    phases = jobs.phases(False, 2)
    names = [
        "check glu silu",
        "check glu gelu",
        "ratio glu ours",
        "ratio glu others",
        "test pytest",
    ]
    last = [
        {"kind": "machine", "operation": "planned", "ok": True, "jobs": names},
        {"kind": "check", "operation": "glu", "ok": True, "job": "check glu silu"},
        {"kind": "check", "operation": "glu", "ok": True, "job": "check glu gelu"},
        {"kind": "machine", "operation": "phase", "variant": "check", "ok": True},
        {"kind": "ratio", "operation": "glu", "ok": True, "job": "ratio glu ours"},
    ]

    def of(phases: list[jobs.Phase]) -> list[str]:
        return [job.name for phase in phases if phase.name != "machine" for job in phase.jobs]

    # It may have been in the middle of what its last row is of.
    assert of(again(phases, last)) == ["ratio glu ours", "ratio glu others", "test pytest"]
    end = {"kind": "machine", "operation": "left out", "ok": True, "jobs": []}
    assert of(again(phases, [*last, end])) == []


@pytest.mark.parametrize(("only", "names"), [(["gul"], []), ([], ["checks"])])
def test_a_name_that_is_none_is_refused(only: list[str], names: list[str]) -> None:
    with pytest.raises(SystemExit, match="choose of"):
        selected(jobs.phases(True, 2), only, names)


def test_what_is_no_whole_run_on_a_gpu_leaves_the_rows_of_one_alone() -> None:
    whole = {"dry": False, "again": False, "profile": "", "sanitize": "", "only": "", "phases": ""}
    assert copies_of(Namespace(**whole))
    for name, value in {
        "dry": True,
        "again": True,
        **dict.fromkeys(list(whole)[2:], "glu"),
    }.items():
        assert copies_of(Namespace(**whole | {name: value})) == (), name


@pytest.mark.parametrize("is_dry", [True, False])
def test_the_tests_that_a_run_ends_with_are_there(is_dry: bool) -> None:
    paths = [word for word in jobs.suite(is_dry, 1).command if word.startswith("tests/")]
    assert paths
    assert all((ROOT / path).exists() for path in paths)
