"""What is timed, how often, and that every case which is planned is there."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from benchmarks.gpu import jobs
from benchmarks.gpu.cases.case import Case, Setting
from benchmarks.gpu.cases.registry import MODULES, cases_of
from benchmarks.gpu.context import Context
from benchmarks.gpu.profile import our_kernels
from benchmarks.gpu.ratios import rows_of
from benchmarks.gpu.timing import num_rounds, num_samples


def test_a_replay_takes_a_millisecond_and_no_graph_grows_without_end() -> None:
    assert num_rounds(round_ms=0.02, num_calls=2) == 50
    assert num_rounds(round_ms=0.9, num_calls=1) == 2
    assert num_rounds(round_ms=3.0, num_calls=1) == 1
    assert num_rounds(round_ms=1e-9, num_calls=8) == 32
    assert num_samples(1.0) == 30
    assert num_samples(100.0) == 8


@pytest.mark.parametrize("size", ["real", "tiny"])
def test_as_many_cases_are_planned_as_there_are(size: str) -> None:
    setting = Setting(torch.device("meta"), torch.bfloat16, torch.bfloat16, size, {})
    assert set(MODULES) == set(jobs.OPERATIONS)
    counts = {name: sum(1 for _ in cases_of(name, setting)) for name in MODULES}
    place = ["real", "tiny"].index(size)
    assert counts == {name: jobs.RATIO_CASES.get(name, (1, 1))[place] for name in MODULES}


@pytest.mark.parametrize(
    ("broken", "others"),
    [
        ("glu", ("rms_norm", "rope_qkv", "attention", "cross_entropy", "adamw", "pack")),
        ("rms_norm", ("glu", "embedding", "clip", "mlp_block", "column_linear")),
        ("rope.apart", ("rope_qkv",)),
        ("linear_cross_entropy", ("cross_entropy", "embedding")),
    ],
)
def test_a_kernel_that_does_not_import_is_missed_by_its_own_operation(
    broken: str, others: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, f"nanotron_fast.kernels.{broken}", None)
    for module in [name for name in sys.modules if name.startswith("benchmarks.gpu.c")]:
        monkeypatch.delitem(sys.modules, module)
    settings = importlib.import_module("benchmarks.gpu.cases.case").Setting
    cases = importlib.import_module("benchmarks.gpu.cases.registry").cases_of
    setting = settings(torch.device("cpu"), torch.bfloat16, torch.float32, "tiny", {})
    operation = broken.replace(".", "_")
    with pytest.raises(ImportError, match=broken):
        next(cases(operation, setting))
    context = importlib.import_module("benchmarks.gpu.context").Context(dry=True)
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "triton")
    for name in others:
        assert next(cases(name, setting)).operation == name
        checks = importlib.import_module(f"benchmarks.gpu.checks.{jobs.CHECKS[name][0]}")
        assert checks.BUILDERS[name](jobs.CHECKS[name][1][0], context).inputs


def _first(operation: str) -> Case:
    setting = Setting(torch.device("meta"), torch.bfloat16, torch.bfloat16, "real", {})
    return next(cases_of(operation, setting))


def test_attention_is_timed_by_every_library_and_what_is_none_says_why() -> None:
    case = _first("attention")
    libraries = ["flash_attn_3", "sdpa_cudnn", "flash_attn_2", "sdpa_flash", "sdpa_varlen"]
    assert [*case.absent] == libraries  # of tensors on no GPU
    assert all("cannot serve this" in reason for reason in case.absent.values())


def test_both_packers_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanotron_fast.kernels import pack

    monkeypatch.delenv("NANOTRON_FAST_BACKEND", raising=False)
    asked: list[str] = []
    packing = importlib.import_module("benchmarks.gpu.cases.packing")
    monkeypatch.setattr(packing, "pack_qkv", lambda *_: asked.append(pack.explain("cuda:0")[1]))
    case = _first("pack")
    for name in ("ours", "ours, Triton", "ours"):
        case.variants[name]()
    auto, triton, again = asked
    assert triton.startswith("NANOTRON_FAST_BACKEND=triton")
    assert auto == again != triton
    assert case.paths["ours"] != "cuda"
    assert "the packer in CUDA" in case.absent
    jobs_of_pack = [job for job in jobs.timings(False) if job.operation == "pack"]
    assert {job.after for job in jobs_of_pack} == {"native build with CUDA"}
    assert [job.variant for job in jobs_of_pack] == ["ours", "others", "case 1"]


def test_what_a_loss_cannot_be_faster_than_is_timed_beside_it() -> None:
    setting = Setting.of(Context(dry=True))
    case = next(cases_of("linear_cross_entropy", setting))
    rows = [*rows_of(case, Context(dry=True), "ours")]
    assert [row["variant"] for row in rows] == ["torch", "bare products", "ours"]
    assert all(row["ok"] for row in rows)


def test_a_row_names_the_library_that_it_ran_on() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    case = Case(
        "double",
        "4",
        lambda: [torch.ones(4)],
        {"torch": double, "a library": double},
        bytes_forward=8,
        paths={"a library": "library 2"},
    )
    assert [row["path"] for row in rows_of(case, Context(dry=True))] == ["torch", "library 2"]


@pytest.mark.parametrize("operation", MODULES)
def test_what_torch_compiles_for_the_timings_is_compiled_ahead(operation: str) -> None:
    setting = Setting(torch.device("meta"), torch.bfloat16, torch.bfloat16, "real", {})
    is_compiled = any("torch.compile" in case.variants for case in cases_of(operation, setting))
    compiled = {job.operation for job in jobs.inductions()}
    assert (operation in compiled) is is_compiled


def test_the_profiler_looks_at_our_kernels() -> None:
    names = our_kernels()
    assert {"_adamw_kernel", "dkv_kernel", "forward_kernel", "gradient_kernel"} <= set(names)
    assert not any("elementwise" in name for name in names)
