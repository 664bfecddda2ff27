"""Launches that are remembered run the binary that Triton would run, with its arguments."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanotron_fast.kernels.runtime import launch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402


def _sum(x_ptr, y_ptr, stride, size, scale, N: tl.constexpr, OTHER: tl.constexpr = 7):
    pass


def _product(x_ptr, y_ptr, stride, size, scale, N: tl.constexpr, OTHER: tl.constexpr = 7):
    pass


class Binary(SimpleNamespace):
    """A compiled kernel, of which there are weak references."""


class Stub:
    """A GPU on which launches are noted: the binary's kind by Triton, and what it is given."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.asked = 0
        self.device = 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 40 + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def binary(self, key: Any, device: int) -> Any:
        def run(x, y, z, stream, function, metadata, told, enter, leave, *arguments) -> None:
            self.launched.append((key, device, (x, y, z), stream, function, metadata, arguments))

        return Binary(
            run=run,
            function=f"function {key}",
            packed_metadata=f"metadata {key}",
            launch_metadata=lambda *arguments: None,
        )


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    stub = Stub()

    def do_compile(self: JITFunction, key: Any, signature: Any, device: int, *rest: Any) -> Any:
        stub.asked += 1
        return self.device_caches[device][0].setdefault(key, stub.binary(key, device))

    monkeypatch.setattr(driver, "_active", stub)
    monkeypatch.setattr(JITFunction, "_do_compile", do_compile)
    monkeypatch.setattr(launch, "_binaries", {})
    return stub


@pytest.fixture
def asked(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often Triton's own path was taken."""
    count = itertools.count()
    getitem = JITFunction.__getitem__

    def counted(self: JITFunction, grid: Any) -> Any:
        next(count)
        return getitem(self, grid)

    monkeypatch.setattr(JITFunction, "__getitem__", counted)
    return lambda: next(count)


VALUES: dict[str, list[Any]] = {
    "x": [
        torch.zeros(64),
        torch.zeros(64)[1:],
        torch.zeros(64)[4:],
        torch.zeros(64, dtype=torch.bfloat16),
        torch.nn.Parameter(torch.zeros(64)),
        None,
    ],
    "y": [torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.int32)],
    "stride": [1, 0, 2, 16, 17, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40, 2**63, True],
    "size": [1, 48, 5],
    "scale": [1.0, 0.5, 16.0, 1, None],
    "named": [{"N": 1}, {"N": 2, "num_warps": 8}, {"N": 2, "OTHER": 1}, {"OTHER": 2, "N": 1}],
}


def test_it_is_what_triton_launches(stub: Stub) -> None:
    """Every pair of values of every two arguments, twice over, the second time from memory."""
    kernel = JITFunction(_sum)
    plain = {name: values[0] for name, values in VALUES.items()}
    pairs = itertools.combinations(VALUES, 2)
    cases = [
        plain | {first: one, second: other}
        for first, second in pairs
        for one in VALUES[first]
        for other in VALUES[second]
    ]
    for case in cases + cases:
        *arguments, named = case.values()
        launch.on_grid(kernel, (3, 2))(*arguments, **named)
        kernel[(3, 2)](*arguments, enable_fp_fusion=True, **named)
        ours, tritons = stub.launched[-2:]
        assert ours[:-1] == tritons[:-1]
        assert len(ours[-1]) == len(tritons[-1])
        assert all(
            type(one) is type(other) and (one is other or one == other)
            for one, other in zip(ours[-1], tritons[-1], strict=True)
        )
    assert len(launch._binaries) > 50


def test_a_binary_is_held_for_as_long_as_it_is_launched(stub: Stub) -> None:
    """From Triton 3.8 on, one that is given up is unloaded from its device."""
    kernel, x = JITFunction(_sum), torch.zeros(64)
    prepared = launch.Prepared((2,), (32, 5, 1.0), N=2)
    launch.on_grid(kernel, (2,))(x, x, 32, 5, 1.0, N=2)
    prepared.launch(kernel, x, x)
    (made,) = kernel.device_caches[0][0].values()
    owner = weakref.ref(made)
    kernel.device_caches.clear()
    del made
    gc.collect()
    assert owner() is not None
    launch._binaries.clear()
    gc.collect()
    assert owner() is not None
    del prepared
    gc.collect()
    assert owner() is None


def test_triton_is_asked_once_for_a_kind(stub: Stub, asked) -> None:
    kernel, x = JITFunction(_sum), torch.zeros(64)
    for programs, scale in ((2, 1.0), (3, 2.5), (4, -1.0)):
        launch.on_grid(kernel, (programs,))(x, x, 32, 5, scale, N=2)
    assert asked() == 1
    assert [launched[2] for launched in stub.launched] == [(2, 1, 1), (3, 1, 1), (4, 1, 1)]
    assert [launched[-1][2:] for launched in stub.launched] == [
        (32, 5, 1.0, 2, 7),
        (32, 5, 2.5, 2, 7),
        (32, 5, -1.0, 2, 7),
    ]


def test_as_many_kinds_are_kept_as_a_step_needs(stub: Stub, monkeypatch) -> None:
    monkeypatch.setattr(launch, "_MOST", 3)
    kernel, x = JITFunction(_sum), torch.zeros(64)
    for stride in range(20):
        launch.on_grid(kernel, (1,))(x, x, stride, 5, 1.0, N=2)
        assert len(launch._binaries) <= 3
    assert [launched[-1][2] for launched in stub.launched] == [*range(20)]


def test_a_device_has_its_own_binary_and_stream(stub: Stub) -> None:
    kernel, x = JITFunction(_sum), torch.zeros(64)
    for device in (0, 1, 0, 1):
        stub.device = device
        launch.on_grid(kernel, (1,))(x, x, 1, 5, 1.0, N=2)
    assert [launched[1] for launched in stub.launched] == [0, 1, 0, 1]
    assert [launched[3] for launched in stub.launched] == [40, 41, 40, 41]


def _hook(*arguments: Any, **named: Any) -> None:
    return None


@pytest.mark.parametrize("watcher", ["enter", "leave", "before", "stand-in", "version"])
def test_a_watcher_sees_every_launch(stub: Stub, asked, watcher, monkeypatch) -> None:
    kernel, x = JITFunction(_sum), torch.zeros(64)
    launch.on_grid(kernel, (1,))(x, x, 1, 5, 1.0, N=2)
    if watcher == "before":
        kernel.add_pre_run_hook(_hook)
    elif watcher == "stand-in":
        run = JITFunction.run
        monkeypatch.setattr(JITFunction, "run", lambda *args, **named: run(*args, **named))
    elif watcher == "version":
        monkeypatch.setattr(launch, "_is_known", False)
    else:
        hooks = getattr(triton.knobs.runtime, f"launch_{watcher.replace('leave', 'exit')}_hook")
        monkeypatch.setattr(hooks, "calls", [_hook])
    for _ in range(2):
        launch.on_grid(kernel, (1,))(x, x, 1, 5, 1.0, N=2)
    assert asked() == 3
    assert len(stub.launched) == 3


def test_a_number_by_name_is_never_remembered(stub: Stub, asked) -> None:
    kernel, x = JITFunction(_sum), torch.zeros(64)
    for scale in (1.0, 2.0):
        launch.on_grid(kernel, (1,))(x, x, 1, 5, scale=scale, N=2)
    assert asked() == 2
    assert [launched[-1][4] for launched in stub.launched] == [1.0, 2.0]


def test_a_tuple_is_never_remembered(stub: Stub, asked) -> None:
    kernel, x = JITFunction(_sum), torch.zeros(64)
    for _ in range(2):
        launch.on_grid(kernel, (1,))(x, x, (2, x), 5, 1.0, N=2)
    assert asked() == 2
    assert len(stub.launched) == 2


def _prepared(scale: float) -> launch.Prepared:
    return launch.Prepared((3,), (32, 5, scale), N=2)


def test_a_prepared_launch_is_what_triton_launches(stub: Stub) -> None:
    kernel, other = JITFunction(_sum), JITFunction(_product)
    prepared = _prepared(0.5)
    for each in (kernel, other):
        for x in VALUES["x"] * 2:
            for y in VALUES["y"]:
                prepared.launch(each, x, y)
                each[(3,)](x, y, 32, 5, 0.5, N=2, enable_fp_fusion=True)
                ours, tritons = stub.launched[-2:]
                assert ours[:-1] == tritons[:-1]
                assert all(a is b or a == b for a, b in zip(ours[-1], tritons[-1], strict=True))
    assert len(prepared._binaries) == 2 * 2 * 5


def test_a_prepared_launch_asks_triton_once(stub: Stub, asked) -> None:
    kernel, prepared = JITFunction(_sum), _prepared(0.5)
    for _ in range(3):
        prepared.launch(kernel, torch.zeros(64), torch.zeros(64))
    assert asked() == 1
    assert [each[2] for each in stub.launched] == [(3, 1, 1)] * 3
    launch.Prepared((2, 0), (32, 5, 1.0), N=2).launch(kernel, torch.zeros(64), torch.zeros(64))
    assert len(stub.launched) == 3


def test_a_prepared_launch_takes_a_tuple_of_numbers(stub: Stub, asked) -> None:
    """As Triton does, who looks at each of them; and from then on without it."""
    kernel, x = JITFunction(_sum), torch.zeros(64)
    for strides in ((32, 1, 0), (33, 2, 16)):
        prepared = launch.Prepared((3,), (strides, 5, 0.5), N=2)
        before = asked()
        for _ in range(2):
            prepared.launch(kernel, x, x)
        assert asked() - before == 2  # the launch, and this look
        kernel[(3,)](x, x, strides, 5, 0.5, N=2, enable_fp_fusion=True)
        first, second, tritons = stub.launched[-3:]
        assert first[:-1] == second[:-1] == tritons[:-1]
        assert first[-1][2:] == second[-1][2:] == tritons[-1][2:] == (strides, 5, 0.5, 2, 7)
    assert stub.asked == 2


def test_what_only_compiles_is_not_launched_later(stub: Stub, asked, monkeypatch) -> None:
    kernel, x = JITFunction(_sum), torch.zeros(64)
    run = JITFunction.run
    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda self, *args, **named: None)
        launch.on_grid(kernel, (1,))(x, x, 1, 5, 1.0, N=2)
    assert JITFunction.run is run
    assert stub.launched == []
    launch.on_grid(kernel, (1,))(x, x, 1, 5, 1.0, N=2)
    assert len(stub.launched) == 1


def test_this_version_of_triton_is_known() -> None:
    """Where it is not, each launch takes Triton's own path, which is right and slow."""
    assert launch._is_known or torch.version.hip is not None
