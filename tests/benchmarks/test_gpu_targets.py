"""What a run's rows say of what the kernels are to reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu.cases.case import Setting
from benchmarks.gpu.cases.registry import cases_of
from benchmarks.gpu.jobs import BESIDE, MODELS
from benchmarks.gpu.targets import _LOSS, _MFU, _SHARES, Target, targets


def _ratio(operation: str, shape: str, variant: str, phase: str, **figures: Any) -> dict[str, Any]:
    about = {"kind": "ratio", "operation": operation, "shape": shape, "variant": variant}
    return about | {"ok": True, "phase": phase, "path": "triton"} | figures


def _step(operation: str, variant: str, **figures: Any) -> dict[str, Any]:
    return {"kind": "step", "operation": operation, "variant": variant, "ok": True} | figures


def _named(rows: list[dict[str, Any]], start: str) -> list[Target]:
    return [each for each in targets(rows) if each.what.startswith(start)]


def test_without_rows_nothing_is_reached() -> None:
    found = [*targets([{"kind": "ratio", "operation": "glu", "ok": False, "variant": "ours"}])]
    assert len(found) == len(_SHARES) + len(_MFU) + len(BESIDE) + 3
    assert not any(each.is_reached for each in found)
    assert all("not measured" in str(each) for each in found)


@pytest.mark.parametrize(("share", "is_reached"), [(0.96, True), (0.94, False)])
def test_a_share_of_the_copy(share: float, is_reached: bool) -> None:
    shape = "32768x4096"
    rows = [
        _ratio("rms_norm", shape, "liger", "forward", fraction_of_ceiling=0.99),
        _ratio("rms_norm", f"{shape} with residual", "ours", "forward", fraction_of_ceiling=0.99),
        _ratio("rms_norm", shape, "ours", "backward", fraction_of_ceiling=0.99),
        _ratio("rms_norm", shape, "ours", "forward", fraction_of_ceiling=share),
    ]
    (found,) = _named(rows, f"rms_norm {shape} forward")
    assert (found.found, found.is_reached) == (share, is_reached)
    assert ("reached" if is_reached else "MISSED") in str(found)


def test_the_packer_is_that_in_cuda() -> None:
    rows = [_ratio("pack", "q, k, v of 4096", "ours", "forward", fraction_of_ceiling=0.95)]
    assert _named(rows, "pack")[0].found is None
    rows[0]["path"] = "cuda"
    assert _named(rows, "pack")[0].is_reached


def test_times_are_held_to_the_fastest_library_and_to_the_products() -> None:
    both = "forward + backward"
    rows = [
        _ratio("attention", "a", "torch SDPA", "forward", p50_ms=2.0),
        _ratio("attention", "a", "sdpa_cudnn", "forward", p50_ms=1.0),
        _ratio("attention", "a", "ours, Triton", "forward", p50_ms=0.5),
        _ratio("attention", "a", "ours, auto", "forward", p50_ms=1.1),
        _ratio("linear_cross_entropy", "b", "bare products", both, p50_ms=10.0),
        _ratio("linear_cross_entropy", "b", "ours", both, p50_ms=11.0),
        _ratio("linear_cross_entropy", "c", "ours", both, p50_ms=11.0),
        _ratio("cross_entropy", _LOSS, "ours", both, p50_ms=2.5),
    ]
    (auto,) = _named(rows, "attention")
    assert auto.found == pytest.approx(1.1)
    assert not auto.is_reached
    linear = _named(rows, "linear_cross_entropy")
    assert [each.is_reached for each in linear] == [True, False]
    assert [each.found for each in linear] == [pytest.approx(1.1), None]
    assert [each.is_reached for each in _named(rows, "cross_entropy")] == [False]


def test_a_step_is_held_to_the_vendors_peak_and_to_the_others() -> None:
    rows = [
        _step("1.1B", "torch", mfu=0.9),
        _step("1.1B", "ours", mfu=0.52, tokens_per_s=7.0),
        _step("1.1B", "ours", cpu_ms=9.0),
        _step("1B, 4k tokens", "transformers, SDPA", tokens_per_s=100.0),
        _step("1B, 4k tokens", "ours", tokens_per_s=110.0),
        _step("1B, 4k tokens", "transformers, Liger", tokens_per_s=120.0),
    ]
    one, three = (next(iter(_named(rows, f"{model}, MFU"))) for model in MODELS)
    assert (one.found, one.is_reached, three.found) == (0.52, True, None)
    beside, not_reached = (next(iter(_named(rows, setting))) for setting in BESIDE)
    assert not_reached.found is None
    assert beside.found == pytest.approx(110 / 120)
    assert not beside.is_reached


@pytest.mark.parametrize(
    ("operation", "shape"), [*(share[:2] for share in _SHARES), ("cross_entropy", _LOSS)]
)
def test_there_is_a_case_for_every_shape(operation: str, shape: str) -> None:
    setting = Setting(torch.device("meta"), torch.bfloat16, torch.bfloat16, "real", {})
    assert any(case.shape.startswith(shape) for case in cases_of(operation, setting))
