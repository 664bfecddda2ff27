"""The CPU mode: Nanotron says 'cuda' and 'nccl', and gets the CPU and gloo.

Nanotron asks for GPUs by name, in dozens of places. While the mode is on

- a device called cuda, in whatever form, means the CPU wherever torch takes a device: a
  `TorchFunctionMode` looks at each call of torch in the thread that entered. No function of torch
  changes, so that what is compiled or scripted meanwhile is not disturbed;
- the functions of `torch.cuda` that Nanotron calls do nothing and count no memory;
- process groups over nccl are made over gloo. It averages, reduces and scatters as nccl does, but
  for two things that groups are taught: see `_unseen_by_autograd` and `_flat`;
- backward runs within the mode too, which torch leaves while it handles a call;
- CUDA_DEVICE_MAX_CONNECTIONS is 1, as Nanotron asserts under tensor parallelism.

Nanotron also looks at what it got, in a handful of functions. Those alone are told otherwise, and
are recognised by their module and name, so that no code of theirs changes: see `_NEEDS_CUDA_DEVICE`
and `_is_available`. Everybody else sees tensors on the CPU and no CUDA.

Leaving puts back every object that was there, also where Nanotron has copied it by
`from torch.distributed import *`. Other threads are not in the mode.
"""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # when first imported it takes stock of torch's functions: the real ones
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from nanotron_fast.patch.lock import one_at_a_time

# Functions of Nanotron that assert that a tensor's device is of type "cuda"; the last one asserts
# "cpu" first and "cuda" after it has moved the tensors.
_NEEDS_CUDA_DEVICE = {
    ("nanotron.models.llama", "init_rotary_embeddings"),
    ("nanotron.models.starcoder2", "init_rotary_embeddings"),
    ("nanotron.nn.rotary", "__init__"),
    ("nanotron.serialize.optimizer", "state_dict_to_device"),
}
_DEVICE = torch.Tensor.device


class _EitherType(str):
    """The type of a device that is the CPU, and is cuda to those that insist."""

    def __eq__(self, other: object) -> bool:
        return other in ("cpu", "cuda")

    __hash__ = str.__hash__


_EITHER_DEVICE = SimpleNamespace(type=_EitherType("cpu"))


def _on_cpu(device: Any) -> Any:
    """What a device becomes: the CPU if it is a GPU in any of torch's notations."""
    if isinstance(device, int) and not isinstance(device, bool):
        return "cpu"
    if isinstance(device, str) and device.partition(":")[0] == "cuda":
        return "cpu"
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    return device


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__self__", None) is _DEVICE and _caller() in _NEEDS_CUDA_DEVICE:
            return _EITHER_DEVICE
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(map(_on_cpu, args[:2])) + args[2:]
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _on_cpu(kwargs["device"])}
        return func(*args, **kwargs)


def _caller() -> tuple[str, str]:
    """Module and name of the function that called the one that asks."""
    frame = sys._getframe(2)
    return frame.f_globals.get("__name__", ""), frame.f_code.co_name


def _is_available() -> bool:
    """To the function that starts torch.distributed, which gives up otherwise, and to the timers of
    main, which do not find themselves again otherwise. To all others there is no GPU: random states
    are the CPU's alone."""
    module, function = _caller()
    return module == "nanotron.logging.timers" or (module, function) == (
        "nanotron.distributed",
        "initialize_torch_distributed",
    )


class _Event:
    """An event of a device that is done with everything at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: _Event) -> float:
        """Milliseconds."""
        return 1000 * (end_event.seconds - self.seconds)


def _device_count() -> int:
    """1 for Nanotron, which divides by it; 0 for everybody else."""
    return int(_caller()[0].startswith("nanotron."))


def _always(result: Any) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        return result

    return function


class _GeneratorType(type(torch.Generator)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _REAL_GENERATOR)


_REAL_GENERATOR = torch.Generator


class _Generator(torch.Generator, metaclass=_GeneratorType):
    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return _REAL_GENERATOR(_on_cpu(device))


def _over_gloo(real: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch.distributed that makes a group, turned to gloo."""

    signature = inspect.signature(real)

    def make(*args: Any, **kwargs: Any) -> Any:
        asked = signature.bind(*args, **kwargs).arguments
        if isinstance(asked.get("backend"), str):
            asked["backend"] = asked["backend"].lower().replace("nccl", "gloo")
        asked.pop("device_id", None)
        return real(**asked)

    return make


def _unseen_by_autograd(real: Callable[..., Any]) -> Callable[..., Any]:
    """Nanotron averages parameters. gloo divides as autograd sees, and may not divide leaves."""

    def reduce(*args: Any) -> Any:
        with torch.no_grad():
            return real(*args)

    return reduce


def _flat(real: Callable[..., Any]) -> Callable[..., Any]:
    """Reduces and scatters by the number of elements, as nccl does: gloo compares shapes."""

    def scatter(
        group: dist.ProcessGroup, output: torch.Tensor, input: torch.Tensor, *args: Any
    ) -> Any:
        return real(group, output.view(-1), input.view(-1), *args)

    return scatter


def _in_mode(real: Callable[..., Any]) -> Callable[..., Any]:
    """Backward within the mode: torch hands its call to the mode, and would run it outside."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _state.mode:
            return real(*args, **kwargs)

    return run


def _loading(real: Callable[..., Any]) -> Callable[..., Any]:
    """torch.load: what was saved on a GPU comes to the CPU."""

    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        where = "cpu" if map_location is None else _on_cpu(map_location)
        return real(f, where, *args, **kwargs)

    return load


_NOTHING_TO_DO = (
    "set_device",
    "synchronize",
    "empty_cache",
    "manual_seed",
    "manual_seed_all",
    "reset_peak_memory_stats",
)
_ZERO = (
    "current_device",
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
)
# Of process groups; what scatters one tensor has another name from torch 2.13 on.
_REDUCES = ("allreduce", "allreduce_coalesced")
_SCATTERS = ("_reduce_scatter_base", "reduce_scatter_single")


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    """Owner, attribute and what it becomes. No two are one object."""
    for name in _NOTHING_TO_DO:
        yield torch.cuda, name, _always(None)
    for name in _ZERO:
        yield torch.cuda, name, _always(0)
    yield torch.cuda, "is_available", _is_available
    yield torch.cuda, "device_count", _device_count
    yield torch.cuda, "Event", _Event
    yield torch, "Generator", _Generator
    yield torch, "load", _loading(torch.load)
    # What torch.autograd.backward and grad come down to.
    yield torch.autograd, "_engine_run_backward", _in_mode(torch.autograd._engine_run_backward)
    for name in ("init_process_group", "new_group"):
        for owner in (dist, distributed_c10d):
            yield owner, name, _over_gloo(getattr(owner, name))
    for names, wrap in ((_REDUCES, _unseen_by_autograd), (_SCATTERS, _flat)):
        for name in names:
            if hasattr(dist.ProcessGroup, name):
                yield dist.ProcessGroup, name, wrap(getattr(dist.ProcessGroup, name))


@dataclass
class _State:
    """What `leave` puts back."""

    depth: int = 0
    mode: _Mode = field(default_factory=_Mode)
    # Owner, attribute, what was there and what is there now.
    replaced: list[tuple[Any, str, Any, Any]] = field(default_factory=list)
    max_connections: str | None = None


_state = _State()
_VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"


def is_on() -> bool:
    """Whether the CPU mode is on."""
    return _state.depth > 0


@one_at_a_time
def enter() -> None:
    """Turns the CPU mode on, for this thread. Within itself it only counts.

    Raises:
        RuntimeError: this process has used CUDA already, so that its tensors lie on a GPU.
    """
    if _state.depth == 0:
        if torch.cuda.is_initialized():
            raise RuntimeError(
                "the CPU mode must be entered before CUDA is used: this process has tensors or "
                "a context on a GPU already"
            )
        for owner, name, replacement in [*_replacements()]:
            # As it lies there: of a class, getattr gives what is made of it.
            _state.replaced.append((owner, name, vars(owner)[name], replacement))
            setattr(owner, name, replacement)
        _state.max_connections = os.environ.get(_VARIABLE)
        os.environ[_VARIABLE] = "1"
        _state.mode.__enter__()
    _state.depth += 1


@one_at_a_time
def leave() -> None:
    """Turns it off, once it was called as often as `enter`.

    Raises:
        RuntimeError: the mode is not on, or another mode of torch was entered after it and is not
            left yet.
    """
    if _state.depth == 0:
        raise RuntimeError("the CPU mode is not on")
    if _state.depth == 1:
        if _get_current_function_mode() is not _state.mode:
            raise RuntimeError("leave the CPU mode after the modes of torch entered within it")
        _state.mode.__exit__(None, None, None)
        _put_back()
        if _state.max_connections is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = _state.max_connections
    _state.depth -= 1


def _put_back() -> None:
    reals = {id(replacement): real for _, _, real, replacement in _state.replaced}
    for module_name, module in [*sys.modules.items()]:
        if module_name.partition(".")[0] == "nanotron":
            for name, value in [*vars(module).items()]:
                if id(value) in reals:
                    setattr(module, name, reals[id(value)])
    for owner, name, real, _ in _state.replaced:
        setattr(owner, name, real)
    _state.replaced.clear()


@contextmanager
def cpu_mode() -> Iterator[None]:
    """`enter` and `leave` around a block."""
    enter()
    try:
        yield
    finally:
        leave()
