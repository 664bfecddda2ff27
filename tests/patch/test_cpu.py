"""The CPU mode without Nanotron: cuda and nccl become the CPU and gloo, and all is put back."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from nanotron_fast.patch import cpu
from nanotron_fast.patch.cpu import cpu_mode
from tests.parallel.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    torch.cuda.is_initialized(), reason="this process has used CUDA: the mode cannot be entered"
)


@pytest.fixture
def mode() -> Iterator[None]:
    with cpu_mode():
        yield


def in_nanotron(module: str, function: str, source: str) -> Callable[..., Any]:
    """A function that calls itself one of Nanotron's."""
    namespace = vars(ModuleType(module)) | {"torch": torch}
    exec(f"def {function}(*args):\n    {source}", namespace)
    return namespace[function]


MAKERS: dict[str, Callable[[Any], Tensor]] = {
    "empty": lambda device: torch.empty(2, device=device),
    "full": lambda device: torch.full((2,), 1.0, device=device),
    "arange": lambda device: torch.arange(2, device=device),
    "tensor": lambda device: torch.tensor([1.0], device=device),
    "as_tensor": lambda device: torch.as_tensor([1.0], device=device),
    "randn": lambda device: torch.randn(2, device=device),
    "zeros_like": lambda device: torch.zeros_like(torch.ones(2), device=device),
    "new_zeros": lambda device: torch.ones(2).new_zeros(3, device=device),
    "to": lambda device: torch.ones(2).to(device),
    "to, with a dtype": lambda device: torch.ones(2).to(device, torch.bfloat16),
    "to, by name": lambda device: torch.ones(2).to(device=device, non_blocking=True),
    "module.to": lambda device: nn.Linear(2, 2).to(device).weight,
    "a module made there": lambda device: nn.Linear(2, 2, device=device).weight,
    "default device": lambda device: in_default(device),
}


def in_default(device: Any) -> Tensor:
    with torch.device("cpu"):
        return torch.empty(2, device=device)


# Before the first test: what a class gives is not what lies in it.
PROCESS_GROUP = dict(vars(dist.ProcessGroup))
GPUS = ["cuda", "cuda:1", torch.device("cuda"), torch.device("cuda", 0), 0]
# Without a GPU torch reads no number in `module.to`, before any mode is asked.
PAIRS = [(name, device) for name in MAKERS for device in GPUS if (name, device) != ("module.to", 0)]


@pytest.mark.parametrize(("name", "device"), PAIRS)
def test_cuda_is_the_cpu(mode: None, name: str, device: Any) -> None:
    assert MAKERS[name](device).device == torch.device("cpu")


def test_other_devices_are_themselves(mode: None) -> None:
    assert torch.empty(2, device="meta").device.type == "meta"
    assert torch.empty(2, device=None).device.type == "cpu"
    assert torch.ones(2).to(torch.float16).dtype == torch.float16
    with pytest.raises(RuntimeError, match="nonsense"):
        torch.empty(2, device="nonsense")


def test_cuda_methods(mode: None) -> None:
    tensor = torch.ones(2, requires_grad=True)
    assert tensor.cuda() is tensor
    assert tensor.cuda(0, non_blocking=True) is tensor
    assert not tensor.is_cuda
    assert nn.Linear(2, 2).cuda().weight.device.type == "cpu"


def test_generators(mode: None) -> None:
    generator = torch.Generator(device="cuda").manual_seed(3)
    assert isinstance(generator, torch.Generator)
    assert not isinstance(3, torch.Generator)
    drawn = torch.randint(0, 100, (5,), device="cuda", generator=generator)
    expected = torch.randint(0, 100, (5,), generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, expected)


class _Allocates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return torch.full((2,), 2.0, device=torch.cuda.current_device()) * dy


@pytest.mark.parametrize("way", ["method", "function", "gradient"])
def test_backward_is_in_the_mode(mode: None, way: str) -> None:
    x = torch.ones(2, requires_grad=True)
    y = _Allocates.apply(x).sum()
    if way == "method":
        y.backward()
    elif way == "function":
        torch.autograd.backward([y])
    else:
        (x.grad,) = torch.autograd.grad(y, x)
    assert x.grad.tolist() == [2.0, 2.0]


def test_what_is_compiled_or_scripted_meanwhile(mode: None) -> None:
    # Nanotron's ring attention is scripted when it is imported.
    scripted = torch.jit.script(_sums)
    assert scripted(torch.ones(3)).tolist() == [3.0]
    compiled = torch.compile(lambda x: x + torch.ones(3, device="cuda"), backend="aot_eager")
    assert compiled(torch.ones(3)).tolist() == [2.0] * 3


def _sums(x: Tensor) -> Tensor:
    out = torch.empty((1,), dtype=torch.float32, device=x.device)
    out[0] = x.sum()
    return out


def test_the_gpu_has_nothing_to_do(mode: None) -> None:
    assert not torch.cuda.is_available()
    assert torch.cuda.device_count() == 0
    assert torch.cuda.current_device() == 0
    torch.cuda.set_device(torch.cuda.device(3))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.manual_seed(1)
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.memory_allocated() + torch.cuda.max_memory_allocated() == 0
    assert torch.cuda.max_memory_reserved("cuda") == 0
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    torch.manual_seed(3)
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize(
    ("module", "function"),
    [
        ("nanotron.models.llama", "init_rotary_embeddings"),
        ("nanotron.models.starcoder2", "init_rotary_embeddings"),
        ("nanotron.nn.rotary", "__init__"),
    ],
)
def test_asserts_of_nanotron_hold(mode: None, module: str, function: str) -> None:
    source = "return args[0].device.type == 'cuda'"
    assert in_nanotron(module, function, source)(torch.ones(1))
    assert not in_nanotron(module, "forward", source)(torch.ones(1))
    assert not in_nanotron("ours", function, source)(torch.ones(1))


def test_a_function_that_asserts_both(mode: None) -> None:
    source = (
        "assert args[0].device.type == 'cpu'; moved = args[0].to('cuda'); "
        "assert moved.device.type == 'cuda'; return moved.device.type"
    )
    move = in_nanotron("nanotron.serialize.optimizer", "state_dict_to_device", source)
    assert move(torch.ones(1)) not in ("mps", "meta")


def test_nanotron_is_told_what_it_needs_to_start(mode: None) -> None:
    source = "return torch.cuda.is_available(), torch.cuda.device_count()"
    name = "nanotron.distributed"
    assert in_nanotron(name, "initialize_torch_distributed", source)() == (True, 1)
    assert in_nanotron("nanotron.logging.timers", "start", source)() == (True, 1)
    assert in_nanotron("nanotron.random", "set_random_seed", source)() == (False, 1)
    assert in_nanotron("transformers.utils", "f", source)() == (False, 0)


def test_events_measure_time(mode: None) -> None:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    time.sleep(0.01)
    end.record()
    end.synchronize()
    assert 10 <= start.elapsed_time(end) < 10_000


def test_what_was_saved_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"step": torch.ones(3)}, tmp_path / "state.pt")
    with cpu_mode():
        for where in ({}, {"map_location": "cuda"}, {"map_location": torch.device("cuda", 0)}):
            loaded = torch.load(tmp_path / "state.pt", **where, weights_only=True)
            assert loaded["step"].device.type == "cpu"


def test_groups_over_nccl_are_over_gloo(mode: None, tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        assert dist.get_backend() == "gloo"
        assert dist.get_backend(dist.new_group([0], backend="nccl")) == "gloo"
        assert dist.get_backend(distributed_c10d.new_group([0])) == "gloo"
    finally:
        dist.destroy_process_group()


def test_gloo_does_what_nccl_does() -> None:
    run_ranks("tests.patch.cpu_ranks", 2)


def everything() -> dict[tuple[str, str], Any]:
    modules = (torch, torch.cuda, dist, distributed_c10d, torch.autograd)
    owners = (*modules, torch.Tensor, nn.Module, dist.ProcessGroup)
    return {
        (owner.__name__, name): value for owner in owners for name, value in [*vars(owner).items()]
    }


@pytest.mark.parametrize("before", [None, "8"])
def test_all_is_put_back(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    variable = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.delenv(variable, raising=False)
    if before:
        monkeypatch.setenv(variable, before)
    found = everything()
    with cpu_mode():
        changed = {key for key, value in everything().items() if found[key] is not value}
        assert ("torch.cuda", "is_available") in changed
        # A scripted function that names one of these would not find it.
        assert ("torch", "empty") not in changed
    left = everything()
    assert left.keys() == found.keys()
    assert [key for key, value in found.items() if left[key] is not value] == []
    assert os.environ.get(variable) == before
    assert dict(vars(dist.ProcessGroup)) == PROCESS_GROUP
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            torch.empty(2, device="cuda")


def test_copies_in_nanotron_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("nanotron.distributed")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    real = dist.init_process_group
    with cpu_mode():
        exec("from torch.distributed import *", vars(module))
        assert module.init_process_group is dist.init_process_group is not real
    assert module.init_process_group is real


def test_it_is_put_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), cpu_mode():
        _ = 1 / 0
    assert not cpu.is_on()


def test_within_itself_it_only_counts(mode: None) -> None:
    load = torch.load
    with cpu_mode():
        assert torch.load is load
    assert cpu.is_on()
    assert torch.empty(2, device="cuda").device.type == "cpu"


def test_leaving_out_of_order() -> None:
    with pytest.raises(RuntimeError, match="the CPU mode is not on"):
        cpu.leave()
    cpu.enter()
    try:
        with (
            torch.device("cpu"),
            pytest.raises(RuntimeError, match="after the modes of torch entered within it"),
        ):
            cpu.leave()
        assert cpu.is_on()
    finally:
        cpu.leave()


def test_it_is_too_late_once_cuda_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="must be entered before CUDA is used"):
        cpu.enter()
    assert not cpu.is_on()
