"""The fused operations: asked for by themselves, on top of single ones, and why they stay off."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanotron_fast.errors import ConfigError
from nanotron_fast.patch.nanotron.registry import disable, enable, status
from nanotron_fast.patch.nanotron.targets import FUSED, MAIN, TARGETS
from tests.patch.small_nanotron import small_nanotron

FILES = {
    "models/qwen.py": (
        "import torch\n"
        "class SiLUActivation(torch.nn.Module):\n"
        "    def forward(self, x): return torch.nn.functional.silu(x)\n"
        "class Qwen2MLP(torch.nn.Module):\n"
        "    def __init__(self, column, row):\n"
        "        super().__init__()\n"
        "        self.gate_up_proj, self.down_proj = column, row\n"
        "        self.act = SiLUActivation()\n"
        "    def forward(self, hidden_states):\n"
        "        gate, up = self.gate_up_proj(hidden_states).chunk(2, -1)\n"
        "        return {'hidden_states': self.down_proj(self.act(gate) * up)}\n"
    ),
    "parallel/__init__.py": "",
    "parallel/tensor_parallel/__init__.py": "",
    "parallel/tensor_parallel/functional.py": (
        "import torch\n"
        "def column_linear(input, weight, bias, group, tp_mode, async_communication):\n"
        "    return torch.nn.functional.linear(input, weight, bias)\n"
        "def row_linear(input, weight, bias, group, tp_mode, async_communication):\n"
        "    return torch.nn.functional.linear(input, weight, bias)\n"
    ),
    "parallel/tensor_parallel/nn.py": (
        "import torch\n"
        "from .functional import column_linear, row_linear\n"
        "class TensorParallelColumnLinear(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        rest = (self.weight, self.bias, self.pg, self.mode, False)\n"
        "        return column_linear(x, *rest)\n"
        "class TensorParallelRowLinear(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return row_linear(x, self.weight, self.bias, self.pg, self.mode, False)\n"
    ),
    "optim/__init__.py": "",
    "optim/gradient_accumulator.py": (
        "class FP32GradientAccumulator:\n"
        "    def __init__(self, model):\n"
        "        self._is_accumulation_sync_step = False\n"
        "        self.parameters = {}\n"
        "        self.fp32_grad_buffers = {\n"
        "            name: {'half': each, 'fp32_grad': each.detach().float().zero_()}\n"
        "            for name, each in model.named_parameters()\n"
        "        }\n"
        "    def backward(self, loss):\n"
        "        loss.backward()\n"
        "        for each in self.fp32_grad_buffers.values():\n"
        "            each['fp32_grad'] += each['half'].grad\n"
        "            each['half'].grad = None\n"
        "    def step(self): ...\n"
        "    def zero_grad(self):\n"
        "        for each in self.fp32_grad_buffers.values():\n"
        "            each['fp32_grad'].zero_()\n"
    ),
}
MLP = {"linear", "glu", "fused_mlp"}


@pytest.fixture
def nanotron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of a small package that is called nanotron, by the last part of their names."""
    with small_nanotron(tmp_path, monkeypatch, FILES) as modules:
        last = {name.rpartition(".")[2]: module for name, module in modules.items()}
        yield types.SimpleNamespace(**last)


def mlp_of(nanotron: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    column = nanotron.nn.TensorParallelColumnLinear(4, 12, bias=False, dtype=dtype)
    row = nanotron.nn.TensorParallelRowLinear(6, 4, bias=False, dtype=dtype)
    for each in (column, row):
        each.pg, each.mode = None, types.SimpleNamespace(name="ALL_REDUCE")
    row.mode = column.mode
    return nanotron.qwen.Qwen2MLP(column, row)


def of(op: str) -> Any:
    """The one target of an operation that the small package has."""
    [found] = [each for each in status() if each.target.op == op and each.state != "missing"]
    return found


def run(mlp: Any) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(5, 4, dtype=mlp.down_proj.weight.dtype, requires_grad=True)
    out = mlp(hidden_states=x)["hidden_states"]
    leaves = (x, mlp.gate_up_proj.weight, mlp.down_proj.weight)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def test_they_are_off_unless_asked_for(nanotron: Any) -> None:
    enable()
    found = {each.target.op: each for each in status() if each.target.op in FUSED}
    assert set(found) == set(FUSED)
    assert {each.state for each in found.values()} == {"off"}
    assert "enable(fused=True) asks for it" in found["fused_mlp"].reason
    enable(fused=True)
    assert of("fused_mlp").state == of("main_grad").state == "on"
    assert of("glu").state == "on"
    enable({"glu"}, fused=True)
    found = {each.target.op: each for each in status()}
    assert found["fused_mlp"].state == "refused"
    assert "needs all of linear replaced" in found["fused_mlp"].reason


def test_one_by_its_name_on_top_of_a_single_one_and_back(nanotron: Any) -> None:
    mlp, home = mlp_of(nanotron), nanotron.qwen.Qwen2MLP
    stock, expected = vars(home)["forward"], run(mlp)
    enable({"linear", "glu"})
    single = vars(home)["forward"]
    enable(MLP)
    assert vars(home)["forward"] not in (stock, single)
    torch.testing.assert_close(run(mlp), expected)
    assert of("fused_mlp").reason == ""
    disable()
    assert vars(home)["forward"] is stock


def test_a_model_that_keeps_its_methods_has_the_one_on_top(nanotron: Any) -> None:
    mlp = mlp_of(nanotron)
    mlp.forward = bound = mlp.forward
    enable(MLP, mlp)
    assert mlp.forward.__func__ is vars(nanotron.qwen.Qwen2MLP)["forward"]
    disable()
    assert mlp.forward is bound


def test_what_is_watched_or_foreign_goes_to_the_single_operations(nanotron: Any) -> None:
    seen: list[Tensor] = []

    def hook(mlp: Any) -> None:
        mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))

    def activation(mlp: Any) -> None:
        mlp.act.register_forward_hook(lambda _, given, out: seen.append(out))

    def adapter(mlp: Any) -> None:
        mlp.down_proj = nn.Sequential(mlp.down_proj)
        mlp.down_proj.weight = mlp.down_proj[0].weight

    def bias(mlp: Any) -> None:
        mlp.gate_up_proj.bias = nn.Parameter(torch.ones(12))

    def dtype(mlp: Any) -> None:
        nanotron.nn.TensorParallelRowLinear.forward = theirs

    stock = nanotron.nn.TensorParallelRowLinear.forward

    def theirs(self: Any, x: Tensor) -> Tensor:
        out: Tensor = 2 * stock(self, x)
        return out

    for change, reason in (
        (hook, "down_proj: it has hooks"),
        (activation, "SiLUActivation is not served, or is watched"),
        (adapter, "down_proj is a Sequential"),
        (bias, "gate_up_proj has a bias"),
        (dtype, "the forward of TensorParallelRowLinear was replaced"),
    ):
        disable()
        mlp = mlp_of(nanotron)
        change(mlp)
        expected = run(mlp)
        seen.clear()
        enable(MLP)
        torch.testing.assert_close(run(mlp), expected)
        assert reason in of("fused_mlp").reason
        assert of("fused_mlp").state == "on"
        assert len(seen) == (change in (hook, activation))
    disable()
    assert not status()


def test_gradients_in_the_sums(nanotron: Any) -> None:
    mlp = mlp_of(nanotron, torch.bfloat16)
    accumulator = nanotron.gradient_accumulator.FP32GradientAccumulator(mlp)
    x = torch.randn(5, 4, dtype=torch.bfloat16)
    exact = mlp_of(nanotron)
    # Versions of torch differ in whether bf16 weights are drawn as fp32 ones are.
    exact.load_state_dict(mlp.state_dict())
    exact(hidden_states=x.float())["hidden_states"].square().sum().backward()
    enable({*MLP, "accumulation", "main_grad"})
    for is_given in (False, True):
        loss = mlp(hidden_states=x)["hidden_states"].square().sum()
        assert hasattr(mlp.down_proj.weight, "main_grad") == is_given
        accumulator.backward(loss)
        for name, wide in exact.named_parameters():
            found = accumulator.fp32_grad_buffers[name]["fp32_grad"]
            torch.testing.assert_close(found, wide.grad, rtol=0.05, atol=0.05)
            # Not rounded to bf16 on the way.
            assert torch.equal(found, found.bfloat16().float()) != is_given
        accumulator.zero_grad()
    mlp.down_proj.weight.main_grad = torch.zeros(4, 6)
    accumulator.zero_grad()
    assert "down_proj.weight: it has a main_grad of somebody else" in of("main_grad").reason
    disable()
    assert hasattr(mlp.down_proj.weight, "main_grad")
    assert not hasattr(mlp.gate_up_proj.weight, "main_grad")


def test_an_accumulator_that_ddp_waits_for(nanotron: Any) -> None:
    mlp = mlp_of(nanotron)
    accumulator = nanotron.gradient_accumulator.FP32GradientAccumulator(mlp)
    enable({"accumulation", "main_grad"})
    accumulator.zero_grad()
    assert hasattr(mlp.down_proj.weight, "main_grad")
    accumulator._is_accumulation_sync_step = True
    accumulator.zero_grad()
    assert not hasattr(mlp.down_proj.weight, "main_grad")
    assert "under DistributedDataParallel" in of("main_grad").reason


def test_a_parameter_without_any_gradient_is_an_error_still(nanotron: Any) -> None:
    mlp = mlp_of(nanotron)
    mlp.unused = nn.Parameter(torch.ones(3))
    accumulator = nanotron.gradient_accumulator.FP32GradientAccumulator(mlp)
    enable({"accumulation", "main_grad"})
    with pytest.raises(AssertionError, match="unused to have gradient"):
        accumulator.backward(mlp(hidden_states=torch.ones(2, 4))["hidden_states"].sum())


def test_bad_values(nanotron: Any) -> None:
    with pytest.raises(ConfigError, match="fused is 'yes': choose from True, False"):
        enable(fused="yes")
    with pytest.raises(
        ConfigError, match=r"unknown operations fused_mlps: choose from .*fused_mlp"
    ):
        enable({"fused_mlps"})


def test_each_stands_after_what_it_needs() -> None:
    for position, target in enumerate(TARGETS):
        before = {each.op for each in TARGETS[:position]}
        after = {each.op for each in TARGETS[position:]}
        assert set(target.needs) <= before - after
        assert bool(target.needs) == (target.op in FUSED)
        assert MAIN in target.versions or target.op not in FUSED
