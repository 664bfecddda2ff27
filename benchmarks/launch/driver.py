"""Launches without a GPU: Triton's own path for each, up to the driver, and nothing behind it.

A kernel is specialised for its arguments, looked up and called as on a GPU. What is called does
nothing, and nothing is compiled: so the time that is left is that of Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class _Driver:
    """An H100 whose launches end here."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_interface(self) -> Any:
        return torch.cuda


def _nothing(*arguments: Any) -> None:
    return None


# What Triton makes of a compiled kernel, as far as a launch and `occupancy` look at it.
_KERNEL = SimpleNamespace(
    run=_nothing,
    function=0,
    packed_metadata=(),
    launch_metadata=_nothing,
    module="loaded",
    n_regs=32,
    metadata=SimpleNamespace(shared=1024, num_warps=4),
    _init_handles=_nothing,
)


def install() -> None:
    """Launches go nowhere from now on, in this process."""

    def do_compile(self: JITFunction, key: Any, signature: Any, device: int, *rest: Any) -> Any:
        self.device_caches[device][0][key] = _KERNEL
        return _KERNEL

    def bench(self: Autotuner, *arguments: Any, config: Any, **named: Any) -> float:
        return 1.0

    driver.set_active(_Driver())
    JITFunction._do_compile = do_compile
    Autotuner._bench = bench


class Launch(NamedTuple):
    """A launch as it was asked for."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    named: dict[str, Any]

    def again(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.named)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Notes every launch, of an autotuned kernel that of the configuration it has settled on."""
    launches: list[Launch] = []
    run = JITFunction.run

    def noting(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        if not warmup:
            if callable(grid):
                grid = grid(dict(zip(self.arg_names, arguments, strict=False)) | named)
            launches.append(Launch(self, grid, arguments, named))
        return run(self, *arguments, grid=grid, warmup=warmup, **named)

    JITFunction.run = noting
    try:
        yield launches
    finally:
        JITFunction.run = run
