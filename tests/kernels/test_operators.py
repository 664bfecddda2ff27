"""Operators run on the device of their tensors, and by torch's dispatcher where that matters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nanotron_fast import kernels
from nanotron_fast.kernels.runtime import backend, operators
from nanotron_fast.kernels.runtime.sizes import ceil_div, next_power_of_2, unit_of

# Which calls of `doubled` and `add_` have reached their functions.
calls: list[str] = []


def _doubled(x: Tensor, others: list[Tensor], scale: float = 1.0) -> Tensor:
    calls.append("body")
    return x * 2 * scale + sum(other.sum() for other in others)


def _add_(totals: list[Tensor], x: Tensor) -> None:
    for total in totals:
        total.detach().numpy()[...] += x.detach().numpy()


for function, types in (
    (_doubled, {"x": Tensor, "others": list[Tensor], "scale": float, "return": Tensor}),
    (_add_, {"totals": list[Tensor], "x": Tensor, "return": None}),
):
    function.__annotations__ = types  # not their names, which infer_schema would look up
doubled = operators.operator("test::doubled")(_doubled)
add_ = operators.operator("test::add_", mutates_args=("totals",))(_add_)


@doubled.register_fake
def _(x, others, scale=1.0):
    return torch.empty_like(x)


class Seen(TorchDispatchMode):
    """Notes which operators of ours come by."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "test":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class OnGpu(Tensor):
    """A tensor that says that it is on the second GPU."""

    is_cuda = True

    def get_device(self) -> int:
        return 1


class OwnDispatch(Tensor):
    """A tensor whose operations it carries out itself."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func.name())
        return torch.zeros(2)


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes calls of `doubled` that go through torch's dispatcher."""
    names: list[str] = []
    overload = doubled.overload

    def counted(*arguments, **named):
        names.append("doubled")
        return overload(*arguments, **named)

    monkeypatch.setattr(doubled, "overload", counted)
    return names


def test_the_device_of_the_first_tensor_is_the_current_one(monkeypatch) -> None:
    entered: list[object] = []

    @contextmanager
    def switch(index: int) -> Iterator[None]:
        entered.append(index)
        yield
        entered.append(None)

    current = 0
    monkeypatch.setattr(torch.cuda, "device", switch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    on_gpu = torch.zeros(2).as_subclass(OnGpu)
    with torch.no_grad():
        doubled(torch.zeros(2), [torch.zeros(1)], scale=2.0)
        assert entered == []
        doubled(torch.zeros(2), [on_gpu])
        assert entered == [1, None]
        doubled(torch.zeros(2), others=[on_gpu])
        assert entered == [1, None] * 2
        current = 1
        doubled(on_gpu, [])
        assert entered == [1, None] * 2


def test_without_a_watcher_the_function_is_called_itself(dispatched) -> None:
    x, weight = torch.ones(2), nn.Parameter(torch.ones(1))
    with torch.no_grad():
        assert doubled(x, [weight], 2.0).tolist() == [5.0, 5.0]
    with torch.inference_mode():
        assert doubled(x, [weight]).tolist() == [3.0, 3.0]
    assert dispatched == []


@pytest.mark.parametrize(
    "watcher",
    [
        Seen,
        torch.enable_grad,
        lambda: torch.autograd.profiler.profile(),
    ],
    ids=["mode", "gradients", "profiler"],
)
def test_a_watcher_is_passed_by_the_dispatcher(watcher, dispatched) -> None:
    with torch.no_grad(), watcher():
        assert doubled(torch.ones(2), []).tolist() == [2.0, 2.0]
    assert dispatched == ["doubled"]


def test_a_mode_sees_operators() -> None:
    with torch.no_grad(), Seen() as seen:
        doubled(torch.ones(2), [])
    assert seen.names == ["test::doubled"]


def test_a_tensor_with_its_own_dispatch_has_its_way() -> None:
    OwnDispatch.seen.clear()
    calls.clear()
    own = torch.zeros(2).as_subclass(OwnDispatch)
    with torch.no_grad():
        for arguments in ((own, []), (torch.zeros(2), [torch.zeros(1), own])):
            doubled(*arguments)
    assert OwnDispatch.seen == ["test::doubled"] * 2
    assert calls == []


@pytest.mark.filterwarnings("ignore:.*jit.trace:DeprecationWarning")
def test_transforms_and_tracers_are_watchers() -> None:
    found = []

    def watch(x: Tensor) -> Tensor:
        found.append(operators.is_watched())
        return x

    with torch.no_grad():
        watch(torch.ones(1))
        torch.vmap(watch)(torch.ones(2, 3))
        torch.jit.trace(watch, torch.ones(1), check_trace=False)
    assert found == [False, True, True]


def test_it_compiles_whole() -> None:
    x = torch.ones(3)

    def call(x: Tensor) -> Tensor:
        return doubled(x, [x], scale=0.5) + 1

    with torch.no_grad():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), call(x))


@pytest.mark.parametrize("is_watched", [False, True])
def test_autograd_learns_what_was_written(is_watched) -> None:
    totals = [torch.zeros(2), torch.zeros(2, requires_grad=True)]
    with torch.inference_mode():
        without_version = torch.zeros(2)
    versions = [total._version for total in totals]
    with torch.no_grad(), Seen() if is_watched else nullcontext():
        add_(totals, torch.ones(2))
        add_(totals=tuple(totals), x=torch.ones(2))
        add_([without_version], torch.ones(2))
    assert [total.tolist() for total in (*totals, without_version)] == [[2.0] * 2] * 2 + [[1.0] * 2]
    assert [total._version for total in totals] == [version + 2 for version in versions]


def test_an_operator_alone_has_no_gradient() -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="test::doubled has no gradient by itself"):
        doubled(x, []).sum().backward()


def test_a_module_that_is_imported_again_defines_its_operators_again() -> None:
    def tripled(x: Tensor) -> Tensor:
        return x * 3

    def quadrupled(x: Tensor) -> Tensor:
        return x * 4

    for function, factor in ((tripled, 3), (quadrupled, 4)):
        function.__annotations__ = {"x": Tensor, "return": Tensor}
        again = operators.operator("test::again")(function)
        assert again(torch.ones(1)).item() == factor


def test_no_operator_is_made_otherwise() -> None:
    folder = Path(next(iter(kernels.__path__)))
    for path in folder.rglob("*.py"):
        if path != folder / "runtime" / "operators.py":
            made = re.search(r"library\.(custom_op|triton_op|Library)", path.read_text())
            assert not made, path


def test_what_is_constant_in_a_graph_is_marked_as_torch_marks_it() -> None:
    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    assert backend.constant_in_a_graph(ours) is ours
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}


def test_sizes_are_those_of_triton() -> None:
    triton = pytest.importorskip("triton")
    for size in (1, 2, 3, 16, 17, 4095, 4096, 50257):
        assert next_power_of_2(size) == triton.next_power_of_2(size)
        assert [ceil_div(size, block) for block in (1, 7, 128)] == [
            triton.cdiv(size, block) for block in (1, 7, 128)
        ]
    assert (ceil_div(0, 8), next_power_of_2(0)) == (0, 1)


def test_the_unit_divides_every_size() -> None:
    assert [unit_of(size) for size in (1365, 2730, 1364, 1368, 4096, 0)] == [1, 2, 4, 8, 8, 8]
    assert unit_of(4096, 0, 4100) == 4
    assert unit_of(4096, 4097) == 1
    assert [unit_of(size, 8) for size in (2**31 - 8, 2**31, 2**34)] == [8, 1, 1]


@pytest.mark.gpu
def test_on_another_gpu_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    from nanotron_fast.kernels.glu import glu

    x = torch.randn(8, 16)
    torch.testing.assert_close(glu(x.to("cuda:1")).cpu(), glu(x), rtol=1e-5, atol=1e-6)
