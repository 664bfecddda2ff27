"""What is timed, how often, and that every case which is planned is there."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from benchmarks.gpu import jobs
from benchmarks.gpu.cases.case import Setting
from benchmarks.gpu.cases.registry import MODULES, cases_of
from benchmarks.gpu.profile import our_kernels
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


def test_the_profiler_looks_at_our_kernels() -> None:
    names = our_kernels()
    assert {"_adamw_kernel", "dkv_kernel", "forward_kernel", "gradient_kernel"} <= set(names)
    assert not any("elementwise" in name for name in names)
