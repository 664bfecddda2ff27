"""Operators of torch's library, which are called without a detour where nobody watches them.

An operator has its schema, its fake function and its refusal of a gradient in torch's dispatcher,
so that torch.compile, its tracers and its modes see it whole. A call through the dispatcher costs
some ten microseconds, which is as long as a launch takes. So an operator's function is called
itself where no one would see the difference: eager mode, plain tensors, no gradient recorded (as
within every autograd function of ours), no tracer, mode, transform or profiler.

Either way it runs on the device of its tensors, and autograd learns what was written in place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

# An operator's qualified name -> what holds its definition. One that is defined anew, by a module
# that is imported again, takes the place of the old.
_libraries: dict[str, torch.library.Library] = {}
# Types of arguments that are no tensors, as they are met.
_no_tensors: set[type] = {bool, int, float, str, type(None)}
_HERE = nullcontext()
# What `survey` gives instead of a GPU.
NO_GPU, OWN_DISPATCH = -1, -2


def is_watched() -> bool:
    """Whether something would miss a call that passes by torch's dispatcher."""
    return (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def survey(arguments: Iterable[Any]) -> int:
    """The GPU of the first tensor that is on one, or NO_GPU, in lists too.

    OWN_DISPATCH where one is of a class that carries out its operations itself.
    """
    index = NO_GPU
    for argument in arguments:
        kind = type(argument)
        if kind in _no_tensors:
            continue
        if kind is list or kind is tuple:
            found = survey(argument)
            if found == OWN_DISPATCH:
                return OWN_DISPATCH
            index = found if index < 0 else index
        elif kind is Tensor or kind is Parameter or isinstance(argument, Tensor):
            if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
                return OWN_DISPATCH
            if index < 0 and argument.is_cuda:
                index = argument.get_device()
        else:
            _no_tensors.add(kind)
    return index


def on_device(index: int) -> AbstractContextManager[Any]:
    """Makes a GPU the current one where it is not; -1 is no GPU.

    torch does so for its own operators alone, and a kernel is launched on the current device: with
    tensors on another GPU it would read nonsense.
    """
    if index < 0 or index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(index)


def tell_autograd(written: Iterable[Tensor]) -> None:
    """Raises the versions of tensors that a kernel has written, so that autograd misses no change.

    Tensors of inference mode have none, and are passed over.
    """
    torch.autograd.graph.increment_version(written)


class Operator:
    """A function as an operator of torch's library; called like the function.

    Args:
        name: with its namespace, "nanotron_fast::glu_forward".
        function: with annotations that torch.library.infer_schema takes. It allocates what it
            returns, and returns none of its arguments.
        mutates_args: the arguments that it writes, tensors or lists of them.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], mutates_args: Sequence[str] = ()
    ) -> None:
        self.name, self.function = name, function
        self.__doc__ = function.__doc__
        places = {key: place for place, key in enumerate(inspect.signature(function).parameters)}
        self._written = [(key, places[key]) for key in mutates_args]
        namespace, _, own_name = name.partition("::")
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        if name in _libraries:
            _libraries.pop(name)._destroy()
        self._library = _libraries[name] = torch.library.Library(namespace, "FRAGMENT")
        self._library.define(own_name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        self._library.impl(own_name, self._from_dispatcher, "CompositeExplicitAutograd")
        self.overload: Any = getattr(getattr(torch.ops, namespace), own_name).default
        if not self._written:
            self._refuse_gradients()
        if not self.overload._schema.returns:
            self.register_fake(_returns_nothing)

    def _refuse_gradients(self) -> None:
        def backward(ctx: Any, *gradients: Tensor) -> None:
            raise RuntimeError(
                f"{self.name} has no gradient by itself: call the function that it is a part of"
            )

        torch.library.register_autograd(self.name, backward, lib=self._library)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Takes the function that gives empty results, for tracers; usable as a decorator."""
        torch.library.register_fake(self.name, fake, lib=self._library)
        return fake

    def _from_dispatcher(self, *arguments: Any, **named: Any) -> Any:
        with on_device(survey((*arguments, *named.values()))):
            result = self.function(*arguments, **named)
        self._tell_autograd(arguments, named)
        return result

    def _tell_autograd(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        for key, place in self._written:
            written = named[key] if key in named else arguments[place]
            tell_autograd((written,) if isinstance(written, Tensor) else written)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if is_watched():  # first of all: torch.compile follows no further
            return self.overload(*arguments, **named)
        index = survey((*arguments, *named.values())) if named else survey(arguments)
        if index == OWN_DISPATCH:
            return self.overload(*arguments, **named)
        if index < 0 or index == torch.cuda.current_device():
            result = self.function(*arguments, **named)
        else:
            with torch.cuda.device(index):
                result = self.function(*arguments, **named)
        if self._written:
            self._tell_autograd(arguments, named)
        return result


def _returns_nothing(*arguments: Any, **named: Any) -> None:
    return None


def operator(
    name: str, *, mutates_args: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Operator]:
    """Makes an `Operator` of the function below it."""

    def register(function: Callable[..., Any]) -> Operator:
        return Operator(name, function, mutates_args)

    return register
