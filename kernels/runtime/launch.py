"""Launches of kernels, and the short way to what was launched before.

Triton binds the arguments of every launch, specialises them, reads its settings and looks the
binary up by a string that it makes of all of them: some twelve microseconds. What its choice
depends on takes two to look at: dtypes, whether addresses and whole numbers are multiples of 16,
which numbers are 1 or take 64 bits, and the constants. So Triton is asked once for each of these
kinds of launch, and its binary is launched from then on.

It is asked each time where that would be missed: kernels that are tuned or interpreted, hooks
around launches, a stand-in for Triton's own path (a counter of launches, a compiler of them), other
hardware, and versions of Triton whose binaries have not been seen to be launched in this way.
Settings of Triton that are changed later count for the kinds of launch that are new then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

try:
    import triton
    from triton import knobs
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction
except ImportError:  # macOS and Windows have no Triton
    triton = None

# A product and the sum after it are rounded once, whatever Triton's default. Versions of Triton
# differ in that default, and with it in the bits of a result and in the registers of a kernel.
_OPTIONS = {"enable_fp_fusion": True}
# Versions whose binaries are launched by `_Binary.run` with these arguments.
_VERSIONS = ("3.6", "3.7", "3.8", "3.9")
# What a number that is neither 1 nor past 32 bits has in a kind: a multiple of 16, or another.
_MULTIPLE, _OTHER = 0, 2

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


_binaries: dict[tuple[Any, ...], _Binary] = {}


def on_grid(kernel: Any, grid: Any) -> Callable[..., None]:
    """`kernel[grid]`, a function of the kernel's arguments. Every launch goes through here.

    What a kernel computes with is passed by position, constants and options by name: those are
    hashable, and of one type for each name.
    """
    return functools.partial(_launch, kernel, grid)


def compiled(kernel: Any, *arguments: Any, **constants: Any) -> Any:
    """The binary that such a launch would run, loaded onto the current GPU and not launched."""
    binary = kernel.warmup(*arguments, grid=(1,), **constants, **_OPTIONS)
    binary._init_handles()  # its registers are known once it is loaded
    return binary


def _launch(kernel: Any, grid: Any, /, *arguments: Any, **constants: Any) -> None:
    if (
        type(kernel) is not JITFunction
        or not _is_known
        or JITFunction.run is not _own_run
        or kernel.pre_run_hooks
        or _has_hooks()
    ):
        kernel[grid](*arguments, **constants, **_OPTIONS)
        return
    active = driver.active
    device = active.get_current_device()
    key = _kind(kernel, device, arguments, constants)
    binary = _binaries.get(key)
    if binary is None:
        made = kernel[grid](*arguments, **constants, **_OPTIONS)
        _remember(key, kernel, made, len(arguments), constants)
        return
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    run, function, metadata, tail = binary
    stream = active.get_current_stream(device)
    run(x, y, z, stream, function, metadata, None, None, None, *arguments, *tail)


def _has_hooks() -> bool:
    """Whether somebody wants to be called around launches: a profiler."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _kind(
    kernel: Any, device: int, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[Any, ...]:
    """All that Triton's choice of a binary depends on, or more."""
    kind: list[Any] = [kernel.fn, device, *constants, *constants.values()]
    for value in arguments:
        of_value = type(value)
        if of_value is Tensor or of_value is Parameter:
            kind.append(value.dtype)
            kind.append(value.data_ptr() % 16 == 0)
        elif of_value is int:
            if value == 1:
                kind.append(1)
            elif -0x80000000 <= value < 0x80000000:
                kind.append(_OTHER if value & 15 else _MULTIPLE)
            else:
                kind.append(value)
        elif of_value is float or of_value is bool:
            kind.append(of_value)
        elif isinstance(value, Tensor):
            kind += (value.dtype, value.data_ptr() % 16 == 0)
        else:
            kind.append(value)
    return tuple(kind)


def _remember(
    key: tuple[Any, ...],
    kernel: Any,
    made: Any,
    num_arguments: int,
    constants: dict[str, Any],
) -> None:
    """Keeps the binary that Triton has launched for a kind, unless it wants to be asked again.

    A parameter by name that is no constant would have a value of its own in every launch.
    """
    rest = kernel.params[num_arguments:]
    if made is None or not all(parameter.is_constexpr for parameter in rest):
        return
    tail = tuple(constants.get(parameter.name, parameter.default) for parameter in rest)
    _binaries[key] = _Binary(made.run, made.function, made.packed_metadata, tail)
