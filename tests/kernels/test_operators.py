"""Operators run on the device of their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanotron_fast import kernels
from nanotron_fast.kernels.runtime import backend


class OnGpu(Tensor):
    """A tensor that says that it is on the second GPU."""

    is_cuda = True
    device = torch.device("cuda", 1)


def test_the_device_of_the_first_tensor_is_the_current_one(monkeypatch) -> None:
    entered = []

    @contextmanager
    def switch(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield
        entered.append(None)

    made = {}

    def custom_op(name, function, *, mutates_args, schema):
        made[name] = (function, tuple(mutates_args), schema)

    monkeypatch.setattr(torch.cuda, "device", switch)
    monkeypatch.setattr(torch.library, "custom_op", custom_op)

    def body(x: Tensor, others: list[Tensor], scale: float = 1.0) -> Tensor:
        entered.append("body")
        return x

    body.__annotations__ = {"x": Tensor, "others": list[Tensor], "scale": float, "return": Tensor}
    backend.operator("test::body", mutates_args=("x",))(body)
    function, mutated, schema = made["test::body"]
    assert mutated == ("x",)
    assert "Tensor(a0!) x, Tensor[] others" in schema
    on_gpu = torch.zeros(2).as_subclass(OnGpu)
    function(torch.zeros(2), [torch.zeros(1)], scale=2.0)
    assert entered == ["body"]
    entered.clear()
    function(torch.zeros(2), [on_gpu])
    assert entered == [torch.device("cuda", 1), "body", None]


def test_no_operator_is_made_otherwise() -> None:
    folder = Path(next(iter(kernels.__path__)))
    for path in folder.rglob("*.py"):
        if path.name != "backend.py":
            assert not re.search(r"library\.(custom_op|triton_op)", path.read_text()), path


def test_what_is_constant_in_a_graph_is_marked_as_torch_marks_it() -> None:
    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    assert backend.constant_in_a_graph(ours) is ours
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}


@pytest.mark.gpu
def test_on_another_gpu_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    from nanotron_fast.kernels.glu import glu

    x = torch.randn(8, 16)
    torch.testing.assert_close(glu(x.to("cuda:1")).cpu(), glu(x), rtol=1e-5, atol=1e-6)
