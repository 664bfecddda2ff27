"""Plans of lists of tensors: when one serves again, and when it does not."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from nanotron_fast.kernels.optimizer import (
    accumulate_,
    adamw_step_,
    clip_grad_norm_,
    get_total_norm,
    plan,
)

OPTIONS = {"lr": 0.5, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_plans", {})
    monkeypatch.setattr(plan, "_captured", [])


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes which operations look at their tensors one by one."""
    names: list[str] = []
    made = plan._made

    def noted(*arguments):
        names.append("made")
        return made(*arguments)

    monkeypatch.setattr(plan, "_made", noted)
    return names


def tensors(device: torch.device, *values: float) -> list[Tensor]:
    return [torch.full((5,), float(value), device=device) for value in values]


def test_the_same_tensors_are_looked_at_once(triton_path, checked) -> None:
    mains, grads = tensors(triton_path, 0, 0), tensors(triton_path, 1, 2)
    for _ in range(3):
        accumulate_(mains, grads)
    assert checked == ["made"]
    assert [main[0].item() for main in mains] == [3.0, 6.0]
    steps = torch.zeros((), device=triton_path)
    averages, squares = (tensors(triton_path, 0, 0) for _ in range(2))
    for _ in range(3):
        clip_grad_norm_(grads, 1e9)
        adamw_step_(mains, grads, averages, squares, steps, **OPTIONS)
    # One each of the norm, the clipping and the step.
    assert checked == ["made"] * 4
    assert [main[0].item() for main in mains] == [1.5, 4.5]
    assert steps.item() == 3


def test_other_tensors_are_other_plans(triton_path, checked) -> None:
    mains, grads = tensors(triton_path, 0, 0), tensors(triton_path, 1, 2)
    accumulate_(mains, grads)
    grads[1] = torch.full((5,), 7.0, device=triton_path)
    accumulate_(mains, grads)
    accumulate_(mains[:1], grads[:1])
    assert checked == ["made"] * 3
    assert [main[0].item() for main in mains] == [3.0, 9.0]


def test_other_memory_of_a_tensor_is_noticed(triton_path, checked) -> None:
    mains, grads = tensors(triton_path, 0), tensors(triton_path, 1)
    accumulate_(mains, grads)
    kept = grads[0].data
    grads[0].data = torch.full((5,), 10.0, device=triton_path)
    accumulate_(mains, grads)
    assert checked == ["made"] * 2
    assert mains[0][0].item() == 11.0
    grads[0].data = torch.zeros(4, device=triton_path)
    with pytest.raises(ValueError, match=r"grads\[0\] \(4,\) for mains\[0\] \(5,\)"):
        accumulate_(mains, grads)
    assert kept[0].item() == 1.0


def test_a_plan_is_gone_with_its_tensors(triton_path) -> None:
    mains, grads = tensors(triton_path, 0), tensors(triton_path, 1)
    accumulate_(mains, grads)
    assert len(plan._plans) == 1
    del grads
    gc.collect()
    assert plan._plans == {}


def test_as_many_are_kept_as_a_step_needs(triton_path, monkeypatch) -> None:
    monkeypatch.setattr(plan, "_NUM_REMEMBERED", 2)
    lists = [tensors(triton_path, value) for value in (1, 2, 3)]
    for each in lists:
        get_total_norm(each)
    assert len(plan._plans) == 2
    assert [get_total_norm(each).item() for each in lists] == pytest.approx(
        [value * 5**0.5 for value in (1, 2, 3)]
    )


def test_a_new_step_counter_is_a_new_plan(triton_path, checked) -> None:
    params, averages, squares = (tensors(triton_path, 0) for _ in range(3))
    grads = tensors(triton_path, 1)
    for number in range(2):
        steps = torch.full((), float(number), device=triton_path)
        adamw_step_(params, grads, averages, squares, steps, **OPTIONS)
        assert steps.item() == number + 1
    assert checked == ["made"] * 2


def test_inference_tensors_are_written(triton_path) -> None:
    with torch.inference_mode():
        mains, grads = tensors(triton_path, 0), tensors(triton_path, 1)
    for _ in range(2):
        accumulate_(mains, grads)
    assert mains[0][0].item() == 2.0


def test_autograd_learns_of_every_write(triton_path) -> None:
    mains, grads = tensors(triton_path, 0), tensors(triton_path, 1)
    version = mains[0]._version
    for _ in range(3):
        accumulate_(mains, grads)
    assert mains[0]._version == version + 3
    assert grads[0]._version == 0


def test_doubles_take_the_reference(triton_path, checked) -> None:
    mains = tensors(triton_path, 0)
    grads = [torch.ones(5, dtype=torch.float64, device=triton_path)]
    accumulate_(mains, grads)
    assert mains[0][0].item() == 1.0


def test_under_a_mode_the_operator_is_called(triton_path, checked) -> None:
    mains, grads = tensors(triton_path, 0), tensors(triton_path, 1)
    with torch.autograd.profiler.profile() as profile:
        accumulate_(mains, grads)
    assert any(event.name == "nanotron_fast::accumulate_" for event in profile.function_events)
    assert checked == []
    assert mains[0][0].item() == 1.0
