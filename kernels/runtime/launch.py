"""Launches of kernels, and the short way to what was launched before.

Triton binds the arguments of every launch, specialises them, reads its settings and looks the
binary up by a string that it makes of all of them: ten microseconds and more. What its choice
depends on takes one or two to look at: dtypes, whether addresses and whole numbers are multiples of
16, which numbers are 1 or take 64 bits, and the constants. So Triton is asked once for each kind of
launch, and its binary is launched from then on.

It is asked each time where that would be missed: kernels that are tuned or interpreted, hooks
around launches, a stand-in for Triton's own path (a counter of launches, a compiler of them), other
hardware, and versions of Triton whose binaries have not been seen to be launched in this way.
Settings of Triton that are changed later count for the kinds of launch that are new then.

    on_grid(kernel, grid)(*arguments, **constants)
    Prepared(grid, numbers, **constants).launch(kernel, *tensors)

The second is for an operation that remembers, by shapes and strides, what it made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial, reduce
from itertools import compress
from operator import attrgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanotron_fast.kernels.runtime import capture

try:
    import triton
    from triton import knobs
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction
except ImportError:  # macOS and Windows have no Triton
    triton = None

# A product and the sum after it are rounded once, whatever Triton's default. Versions of Triton
# differ in that default, and with it in the bits of a result and in the registers of a kernel.
# They come before the constants, as in launches by Triton's tuner: their order is a part of what a
# binary is found by.
_OPTIONS = {"enable_fp_fusion": True}
# Versions whose binaries are launched by `_Binary.run` with these arguments.
_VERSIONS = ("3.6", "3.7", "3.8", "3.9")
# Kinds that are remembered: those of a training step are some hundreds, and where sizes vary from
# step to step most are not met again.
_MOST = 8192
_dtype = attrgetter("dtype")

_own_run = None if triton is None else JITFunction.run
_is_known = (
    triton is not None
    and ".".join(triton.__version__.split(".")[:2]) in _VERSIONS
    and torch.version.hip is None
)


class _Binary(NamedTuple):
    """A compiled kernel that is loaded onto its device."""

    run: Callable[..., object]
    function: Any
    metadata: Any
    # What follows the arguments of a launch: the kernel's constants, in its order.
    constants: tuple[Any, ...]
    # Triton's own, which from Triton 3.8 on unloads the function when it goes.
    owner: Any


_binaries: dict[tuple[Any, ...], _Binary] = {}


def on_grid(kernel: Any, grid: Any) -> Callable[..., None]:
    """`kernel[grid]`, a function of the kernel's arguments. Every launch goes through here.

    What a kernel computes with is passed by position, constants and options by name: those are
    hashable, and of one type for each name.
    """
    return partial(_launch, kernel, grid)


def compiled(kernel: Any, *arguments: Any, **constants: Any) -> Any:
    """The binary that such a launch would run, loaded onto the current GPU and not launched."""
    binary = kernel.warmup(*arguments, grid=(1,), **_OPTIONS, **constants)
    _refuse_to_load(binary, kernel)
    binary._init_handles()  # its registers are known once it is loaded
    return binary


class Prepared:
    """A launch of which all but the kernel and its tensors is known.

    Args:
        grid: one to three numbers of programs; a launch without programs does nothing.
        numbers: the kernel's arguments after its tensors, numbers and tuples of them.
        constants: its constants and options by name.
    """

    def __init__(self, grid: Sequence[int], numbers: Sequence[Any], **constants: Any) -> None:
        self.grid, self.numbers, self.constants = (*grid, 1, 1)[:3], tuple(numbers), constants
        self._is_empty = 0 in grid
        self._binaries: dict[tuple[Any, ...], _Binary] = {}

    def launch(self, kernel: Any, *tensors: Tensor | None) -> None:
        """Launches a kernel, whose first arguments are the tensors."""
        if self._is_empty:
            return
        if _asks_triton(kernel):
            on_grid(kernel, self.grid)(*tensors, *self.numbers, **self.constants)
            return
        active = driver.active
        device = active.get_current_device()
        given = [tensor for tensor in tensors if tensor is not None]
        key = (kernel.fn, device, *map(type, tensors), *map(_dtype, given), _alignment(given))
        binary = self._binaries.get(key)
        if binary is None:
            arguments = (*tensors, *self.numbers)
            found = _binary_of(kernel, self.grid, device, arguments, self.constants)
            if found is not None:
                self._binaries[key] = found
            return
        x, y, z = self.grid
        run, function, metadata, constants, _ = binary
        stream = active.get_current_stream(device)
        rest = (*tensors, *self.numbers, *constants)
        run(x, y, z, stream, function, metadata, None, None, None, *rest)


def _launch(kernel: Any, grid: Any, /, *arguments: Any, **constants: Any) -> None:
    if callable(grid) or _asks_triton(kernel):
        _by_triton(kernel, grid, arguments, constants)
        return
    active = driver.active
    device = active.get_current_device()
    binary = _binaries.get(_kind(kernel, device, arguments, constants))
    if binary is None:
        _binary_of(kernel, grid, device, arguments, constants)
        return
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    run, function, metadata, tail, _ = binary
    stream = active.get_current_stream(device)
    run(x, y, z, stream, function, metadata, None, None, None, *arguments, *tail)


def _asks_triton(kernel: Any) -> bool:
    """Whether a launch takes Triton's own path."""
    return (
        type(kernel) is not JITFunction
        or not _is_known
        or JITFunction.run is not _own_run
        or bool(kernel.pre_run_hooks)
        or _has_hooks()
    )


def _has_hooks() -> bool:
    """Whether somebody wants to be called around launches: a profiler."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _alignment(tensors: Sequence[Tensor]) -> int | tuple[int, ...]:
    """0 where all addresses are multiples of 16, or else what is over of each."""
    addresses = [*map(Tensor.data_ptr, tensors)]
    return reduce(or_, addresses, 0) & 15 and tuple([address & 15 for address in addresses])


def _kind(
    kernel: Any, device: int, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[Any, ...]:
    """All that Triton's choice of a binary depends on, and more: whole numbers as they are.

    It is made of few steps, each of which is one of C's: this is most of what a launch costs. A
    kernel goes by its function, whose hash takes no time. Empty where an argument is neither a
    tensor nor a number: such a launch is none of a kind.
    """
    types = tuple(map(type, arguments))
    are_tensors, are_numbers, are_known = _selected(types)
    if not are_known:
        return ()
    tensors = [*compress(arguments, are_tensors)]
    return (
        kernel.fn,
        device,
        types,
        *map(_dtype, tensors),
        _alignment(tensors),
        *compress(arguments, are_numbers),
        *constants,
        *constants.values(),
    )


@lru_cache(maxsize=1024)
def _selected(types: tuple[type, ...]) -> tuple[list[bool], list[bool], bool]:
    """Which arguments are tensors, which are whole numbers, and whether nothing else is there."""
    are_tensors = [issubclass(each, Tensor) for each in types]
    are_numbers = [each is int for each in types]
    plain = (int, float, bool, type(None))
    return are_tensors, are_numbers, all(issubclass(each, (Tensor, *plain)) for each in types)


def _refuse_to_load(binary: Any, kernel: Any) -> None:
    """Raises RuntimeError where a graph is captured and the binary is not loaded yet.

    CUDA loads none then, and a binary of Triton's that was refused is never loaded after that.
    """
    if binary is not None and binary.module is None:
        device = torch.device("cuda")
        capture.refuse_if_capturing(device, f"{kernel.__name__}, of a kind that is not loaded")


def _by_triton(
    kernel: Any, grid: Any, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> Any:
    """Triton's own launch; what it launched."""
    device = next((each.device for each in arguments if isinstance(each, Tensor)), None)
    if device is not None and capture.is_capturing(device):
        own = kernel.fn if type(kernel) is Autotuner else kernel
        if type(own) is JITFunction and not own.pre_run_hooks:  # which this would call too
            options = {"grid": grid, "warmup": True, **_OPTIONS, **constants}
            _refuse_to_load(kernel.run(*arguments, **options), own)
    return kernel[grid](*arguments, **_OPTIONS, **constants)


def _binary_of(
    kernel: Any,
    grid: Sequence[int],
    device: int,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> _Binary | None:
    """Lets Triton launch, and keeps what it launched.

    A parameter by name that is no constant would have a value of its own in every launch: it is not
    kept, and neither is what was only compiled.
    """
    made = _by_triton(kernel, grid, arguments, constants)
    rest = kernel.params[len(arguments) :]
    if made is None or not all(parameter.is_constexpr for parameter in rest):
        return None
    tail = tuple(constants.get(parameter.name, parameter.default) for parameter in rest)
    binary = _Binary(made.run, made.function, made.packed_metadata, tail, made)
    kind = _kind(kernel, device, arguments, constants)
    if kind:
        if len(_binaries) >= _MOST:
            _binaries.clear()
        _binaries[kind] = binary
    return binary
