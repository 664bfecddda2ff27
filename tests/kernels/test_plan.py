"""Plans of lists of tensors: when one serves again, and when it does not."""

from __future__ import annotations

import gc
import struct
from collections import Counter
from collections.abc import Callable

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
from tests.kernels.plans import counted

OPTIONS = {"lr": 0.5, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_looks", {})


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    return counted(monkeypatch)


def tensors(device: torch.device, *values: float) -> list[Tensor]:
    return [torch.full((5,), float(value), device=device) for value in values]


def test_the_same_tensors_are_looked_at_once(triton_path, made) -> None:
    mains, grads = tensors(triton_path, 0, 0), tensors(triton_path, 1, 2)
    for _ in range(4):
        accumulate_(mains, grads)
    assert made == {"looks": 1, "tables": 1}
    assert [main[0].item() for main in mains] == [4.0, 8.0]
    steps = torch.zeros((), device=triton_path)
    averages, squares = (tensors(triton_path, 0, 0) for _ in range(2))
    for _ in range(4):
        clip_grad_norm_(grads, 1e9)
        adamw_step_(mains, grads, averages, squares, steps, **OPTIONS)
    # One each of the norm, the clipping and the step.
    assert made == {"looks": 4, "tables": 4}
    assert [main[0].item() for main in mains] == [2.0, 6.0]
    assert steps.item() == 4


def test_known_tensors_are_not_looked_at(triton_path, monkeypatch) -> None:
    """From the third time on: the second knows that they are no new ones."""
    mains, grads = tensors(triton_path, 0, 0), tensors(triton_path, 1, 2)
    for _ in range(2):
        accumulate_(mains, grads)
    monkeypatch.setattr(plan._Column, "_looks_like", None)
    accumulate_(mains, grads)
    assert [main[0].item() for main in mains] == [3.0, 6.0]


def test_views_that_are_made_anew_need_no_tables(triton_path, made) -> None:
    mains, grads = tensors(triton_path, 0, 0), tensors(triton_path, 1, 2)
    for _ in range(4):
        accumulate_([main.view(5) for main in mains], [grad.detach() for grad in grads])
    assert made == {"looks": 1, "tables": 1}
    assert [main[0].item() for main in mains] == [4.0, 8.0]


def test_tensors_that_look_the_same_need_tables_alone(triton_path, made) -> None:
    mains, kept = tensors(triton_path, 0, 0), []
    for value in range(5):
        grads = tensors(triton_path, value, 2 * value)
        kept.append(grads)
        accumulate_(mains, grads)
    assert made == {"looks": 1, "tables": 5}
    assert [main[0].item() for main in mains] == [10.0, 20.0]
    accumulate_(mains[:1], kept[0][:1])
    assert made == {"looks": 2, "tables": 6}


def test_addresses_that_are_not_aligned(triton_path, made) -> None:
    """They are read element by element, and beside them others are not."""
    mains, grads = ([torch.zeros(12, device=triton_path)[:8] for _ in range(3)] for _ in range(2))
    accumulate_(mains, grads)
    shifted = [torch.full((12,), float(at), device=triton_path)[at : at + 8] for at in (1, 0, 3)]
    for _ in range(2):
        accumulate_(mains, shifted)
    assert made == {"looks": 1, "tables": 2}
    assert [main.tolist() for main in mains] == [[2.0] * 8, [0.0] * 8, [6.0] * 8]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda grad: grad.view(3, 2), r"grads\[0\] \(3, 2\) for mains\[0\] \(2, 3\)"),
        (lambda grad: grad.view(3, 2).t(), r"grads\[0\] \(2, 3\) has strides \(1, 2\)"),
        (lambda grad: grad.to("meta"), r"grads\[0\] on meta, mains\[0\] on "),
        (lambda grad: grad.int(), r"grads\[0\] is torch.int32"),
    ],
    ids=["shape", "strides", "device", "dtype"],
)
def test_what_looks_otherwise_is_checked(triton_path, other, message) -> None:
    mains, grads = ([torch.zeros(2, 3, device=triton_path)] for _ in range(2))
    for _ in range(3):
        accumulate_(mains, grads)
    with pytest.raises(ValueError, match=message):
        accumulate_(mains, [other(grad) for grad in grads])


def test_another_class_or_dtype_is_another_look(triton_path, made) -> None:
    mains, grads = tensors(triton_path, 0), tensors(triton_path, 1)
    for others in (grads, [torch.nn.Parameter(grads[0])], [grads[0].bfloat16()], grads):
        accumulate_(mains, others)
    assert made["looks"] == 3
    assert mains[0][0].item() == 4.0


def test_other_memory_of_a_tensor_is_noticed(triton_path, made) -> None:
    mains, grads = tensors(triton_path, 0), tensors(triton_path, 1)
    for _ in range(3):
        accumulate_(mains, grads)
    kept = grads[0].data
    grads[0].data = torch.full((5,), 10.0, device=triton_path)
    accumulate_(mains, grads)
    assert made == {"looks": 1, "tables": 2}
    assert mains[0][0].item() == 13.0
    grads[0].data = torch.zeros(4, device=triton_path)
    with pytest.raises(ValueError, match=r"grads\[0\] \(4,\) for mains\[0\] \(5,\)"):
        accumulate_(mains, grads)
    assert kept[0].item() == 1.0


def _other_storage(tensor: Tensor) -> None:
    """As FSDP does with what it has gathered: a tensor's memory goes, and comes back elsewhere."""
    storage, values = tensor.untyped_storage(), tensor.clone()
    num_bytes = storage.nbytes()
    storage.resize_(0)
    taken = torch.empty_like(values)
    storage.resize_(num_bytes)
    tensor.copy_(values.add_(1))
    assert taken.data_ptr() != tensor.data_ptr()


def _loaded(lists: dict[str, list[Tensor]]) -> None:
    """As load_state_dict() does: tensors of their own."""
    for label in ("exp_avgs", "exp_avg_sqs"):
        lists[label] = [tensor.clone().add_(1) for tensor in lists[label]]


def _set_data(tensor: Tensor, data: Tensor) -> None:
    tensor.data = data


CHANGES: dict[str, Callable[[dict[str, list[Tensor]]], object]] = {
    "states are loaded": _loaded,
    "a gradient is new": lambda lists: lists["grads"].__setitem__(1, lists["grads"][1] * 3),
    "gradients change places": lambda lists: lists["grads"].reverse(),
    "a parameter's data": lambda lists: _set_data(lists["params"][0], lists["params"][0] + 1),
    "a parameter's data and dtype": lambda lists: _set_data(
        lists["params"][0], lists["params"][0].half()
    ),
    "a state's set_": lambda lists: lists["exp_avgs"][1].set_(lists["exp_avgs"][1] + 1),
    "a storage": lambda lists: _other_storage(lists["copies"][0]),
    "a dtype at the same address": lambda lists: lists["grads"].__setitem__(
        1, lists["grads"][1].view(torch.bfloat16)[:5]
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_of_known_lists_is_noticed(triton_path, monkeypatch, change) -> None:
    lists = {
        label: tensors(triton_path, *values)
        for label, values in {
            "params": (3, 5),
            "grads": (1.25, -2),
            "exp_avgs": (0, 0),
            "exp_avg_sqs": (0, 0),
            "copies": (0, 0),
        }.items()
    }
    steps = torch.zeros((), device=triton_path)
    for _ in range(4):
        adamw_step_(**lists, steps=steps, lr=0.5)
    ((look,),) = plan._looks.values()
    assert all(len(column.known) == 1 for column in look.columns)
    before = [*map(list, lists.values())]  # what is replaced stays where it is
    change(lists)
    alike = {label: [tensor.clone() for tensor in each] for label, each in lists.items()}
    steps_alike = steps.clone()
    adamw_step_(**lists, steps=steps, lr=0.5)
    del before
    monkeypatch.setattr(plan, "_looks", {})
    adamw_step_(**alike, steps=steps_alike, lr=0.5)
    for label, each in lists.items():
        for tensor, same in zip(each, alike[label], strict=True):
            assert torch.equal(tensor, same), label


def test_identities_of_a_list() -> None:
    first, second = torch.zeros(1), torch.zeros(1)
    held = [first, second, first]
    assert plan._identities(held) == struct.pack("3P", id(first), id(second), id(first))
    assert plan._identities([]) == b""


def test_a_list_is_known_while_its_tensors_are_there(triton_path) -> None:
    mains, grads, others = (tensors(triton_path, value, value) for value in range(3))
    for each in (grads, grads, others, others):
        accumulate_(mains, each)
    ((look,),) = plan._looks.values()
    known = look.columns[1].known
    assert [*known] == [id(grads[0]), id(others[0])]
    del grads[1], each
    gc.collect()
    assert [*known] == [id(others[0])]
    others.clear()
    gc.collect()
    assert known == {}


def test_as_many_are_kept_as_a_step_needs(triton_path, monkeypatch) -> None:
    monkeypatch.setattr(plan, "_NUM_REMEMBERED", 2)
    monkeypatch.setattr(plan, "NUM_PLANS", 2)
    lists = [tensors(triton_path, *range(1, count)) for count in (2, 3, 4)]
    for each in lists:
        get_total_norm(each)
    assert sum(map(len, plan._looks.values())) == 2
    assert [get_total_norm(each).item() for each in lists] == pytest.approx(
        [(5 * squares) ** 0.5 for squares in (1, 5, 14)]
    )
    alike = [tensors(triton_path, value) for value in range(3)]
    for each in alike:
        get_total_norm(each)
    assert [len(look.plans) for look in next(reversed(plan._looks.values()))] == [2]


def test_a_new_step_counter_is_another_table_alone(triton_path, made) -> None:
    params, averages, squares = (tensors(triton_path, 0) for _ in range(3))
    grads = tensors(triton_path, 1)
    for number in range(2):
        steps = torch.full((), float(number), device=triton_path)
        adamw_step_(params, grads, averages, squares, steps, **OPTIONS)
        assert steps.item() == number + 1
    assert made == {"looks": 1, "tables": 2}


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


def test_doubles_take_the_reference(triton_path) -> None:
    mains = tensors(triton_path, 0)
    grads = [torch.ones(5, dtype=torch.float64, device=triton_path)]
    accumulate_(mains, grads)
    assert mains[0][0].item() == 1.0


def test_under_a_mode_the_operator_is_called(triton_path, made) -> None:
    mains, grads = tensors(triton_path, 0), tensors(triton_path, 1)
    with torch.autograd.profiler.profile() as profile:
        accumulate_(mains, grads)
    assert any(event.name == "nanotron_fast::accumulate_" for event in profile.function_events)
    assert made == {}
    assert mains[0][0].item() == 1.0
