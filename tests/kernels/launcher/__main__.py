"""Launches every operation by Triton's own launcher onto a driver that is none, without a GPU.

    python -m tests.kernels.launcher [operation ...]

`libcuda.c` stands for the driver: what Triton has compiled for sm_90 is loaded there and launched
with tensors of the CPU, and nothing runs. Each launch is made as the operation makes it, once more,
which is the short way of `runtime/launch.py`, and by Triton's own path. The last two must give the
driver the same function, grid, block, shared memory and parameters, bit for bit. Prints a line for
each operation, and exits with 1 where a launch differs, or none takes the short way.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
os.environ["NANOTRON_FAST_BACKEND"] = "triton"

import torch
import triton
from torch import Tensor
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import CompiledKernel
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from nanotron_fast.kernels.attention import attention, operators
from nanotron_fast.kernels.runtime import launch
from tests.kernels.operations import OPERATIONS, Operation, run

_INCLUDE = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
_SOURCE = Path(__file__).with_name("libcuda.c")
# A parameter of a kernel in PTX: its type, and its elements where it is a block of bytes.
_PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.[bsuf](\d+)[^,)\n]*?(?:\[(\d+)\])?[,\n]")


class Launched(NamedTuple):
    """What reached the driver."""

    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    parameters: tuple[bytes, ...]


class _Config(ctypes.Structure):
    """The beginning of CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
    ]


_launched: list[Launched] = []
# A function of the driver -> bytes of its parameters.
_sizes: dict[int, list[int]] = {}


def _watch(config: Any, function: int, parameters: Any) -> None:
    sizes = _sizes[function]
    values = tuple(ctypes.string_at(parameters[i], size) for i, size in enumerate(sizes))
    config = config.contents
    _launched.append(
        Launched(function, tuple(config.grid), tuple(config.block), config.shared_bytes, values)
    )


_Watcher = ctypes.CFUNCTYPE(
    None, ctypes.POINTER(_Config), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
)
_watcher = _Watcher(_watch)


def parameter_bytes(ptx: str) -> list[int]:
    """Bytes of each parameter of the kernel of a PTX file."""
    entry = re.search(r"\.entry \w+\((.*?)\n\)", ptx, re.S)
    assert entry is not None, ptx[:2000]
    return [int(bits) // 8 * int(count or 1) for bits, count in _PARAMETER.findall(entry[1] + "\n")]


def _load_driver(folder: Path) -> None:
    library = folder / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-Wall", "-Werror", f"-I{_INCLUDE}", str(_SOURCE)]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1", "-o", str(library)], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    # Whoever asks for libcuda.so.1 from now on is given this one.
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL).watch_launches(_watcher)


def install(folder: Path) -> None:
    """Triton's driver for an H100, on the stand-in, which is built in a folder that stays."""
    _load_driver(folder)
    active = CudaDriver()
    active.get_current_device = lambda: 0
    active.get_device_capability = lambda device=0: (9, 0)
    active.get_current_stream = lambda device=0: 0
    driver.set_active(active)

    init_handles = CompiledKernel._init_handles

    def noting(self: CompiledKernel) -> None:
        init_handles(self)
        _sizes[self.function] = parameter_bytes(self.asm["ptx"])

    CompiledKernel._init_handles = noting
    Autotuner._bench = lambda self, *arguments, config, **named: 1.0
    scratch = torch.empty(1 << 20, dtype=torch.int8)
    operators._scratch = lambda num_bytes, alignment, stream: scratch


class Tally:
    """Launches of an operation.

    Args:
        short: that took the short way; `asked` are autotuned, and take Triton's own.
        wrong: what was found.
    """

    def __init__(self) -> None:
        self.short, self.asked = 0, 0
        self.wrong: list[str] = []

    def compare(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        again: Callable[[], object],
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
    ) -> None:
        """Launches once more, and by Triton's own path."""
        if launch._asks_triton(kernel):
            self.asked += 1
            return
        name, before = kernel.fn.__name__, len(_launched)
        with _no_new_binary(self.wrong, name):
            again()
        kernel[grid](*arguments, **launch._OPTIONS, **constants)
        if len(_launched) != before + 2:
            self.wrong.append(f"{name}: {len(_launched) - before} launches instead of 2")
            return
        self.short += 1
        short, own = _launched[before:]
        if short != own:
            self.wrong.append(f"{name}: {short} instead of {own}")
        addresses = {value.data_ptr() for value in _flat(arguments) if isinstance(value, Tensor)}
        missing = addresses - {int.from_bytes(each, "little") for each in own.parameters}
        if missing:
            self.wrong.append(f"{name}: addresses {missing} are not among {own.parameters}")


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from _flat(value)
        else:
            yield value


@contextmanager
def _no_new_binary(wrong: list[str], name: str) -> Iterator[None]:
    """Holds that Triton is not asked."""
    made = launch._binary_of

    def asked(*arguments: Any) -> Any:
        wrong.append(f"{name}: the second launch of a kind asks Triton")
        return made(*arguments)

    launch._binary_of = asked
    try:
        yield
    finally:
        launch._binary_of = made


@contextmanager
def _compared(tally: Tally) -> Iterator[None]:
    """Compares every launch in the block."""
    on_grid, of_prepared = launch._launch, launch.Prepared.launch

    def by_grid(kernel: Any, grid: Any, /, *arguments: Any, **constants: Any) -> None:
        on_grid(kernel, grid, *arguments, **constants)
        if type(kernel) is JITFunction and callable(grid):
            grid = grid(constants)

        def again() -> None:
            on_grid(kernel, grid, *arguments, **constants)

        tally.compare(kernel, grid, again, arguments, constants)

    def prepared(self: launch.Prepared, kernel: Any, *tensors: Tensor | None) -> None:
        of_prepared(self, kernel, *tensors)

        def again() -> None:
            of_prepared(self, kernel, *tensors)

        tally.compare(kernel, self.grid, again, (*tensors, *self.numbers), self.constants)

    launch._launch, launch.Prepared.launch = by_grid, prepared
    try:
        yield
    finally:
        launch._launch, launch.Prepared.launch = on_grid, of_prepared


def _random(*shapes: tuple[int, ...]) -> Callable[[torch.device], list[Tensor]]:
    return lambda device: [torch.randn(shape).requires_grad_() for shape in shapes]


# Those of the other tests read nothing by the bulk copy engine: it wants whole heads.
_WHOLE_HEADS = Operation(
    "attention of whole heads",
    _random((1, 64, 4, 64), (1, 64, 2, 64), (1, 64, 2, 64)),
    lambda q, k, v: attention(q, k, v, softcap=30.0),
)


def _make(operation: Operation, dtype: torch.dtype) -> list[Tensor]:
    """Its tensors, what has a gradient in a dtype."""
    tensors = operation.make(torch.device("cpu"))
    return [
        each.detach().to(dtype).requires_grad_() if each.requires_grad else each for each in tensors
    ]


def main(names: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder))
        return _compare_all(names)


def _compare_all(names: list[str]) -> int:
    failures = 0
    for operation in (*OPERATIONS, _WHOLE_HEADS):
        if names and operation.name not in names:
            continue
        tally = Tally()
        tensors = _make(operation, torch.bfloat16)
        with _compared(tally):
            # An autotuned launch is settled by the first, and short in the second.
            for _ in range(2):
                run(operation.call, tensors)
        wrong = list(dict.fromkeys(tally.wrong))
        if not tally.short and operation.has_kernel:
            wrong.append("nothing took the short way")
        failures += bool(wrong)
        state = "FAILED" if wrong else "ok"
        print(f"{state} {operation.name}: {tally.short} short launches, {tally.asked} by Triton")
        for line in wrong:
            print(f"  {line}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
