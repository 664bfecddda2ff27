"""Whose code a function is: Nanotron's own, ours, or somebody else's."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from nanotron_fast.patch.hooks import why_not_past


def replaced_by(function: Callable[..., Any], module: str) -> str:
    """Who put it in the place of what a module of Nanotron defines; empty where it is its own.

    Nanotron decorates some functions, with its own decorators and torch's.

    Args:
        function: what lies there.
        module: the name of the module.
    """
    code = getattr(function, "__code__", None)
    if code is None:
        return type(function).__module__
    package = _folder("nanotron")
    is_own = code.co_filename.startswith(package) or code.co_filename in torch_decorators()
    if is_own and function.__module__ == module:
        return ""
    return f"{function.__module__} ({code.co_filename})"


@cache
def torch_decorators() -> frozenset[str]:
    """The files that torch's context managers wrap functions in, as decorators."""

    def nothing() -> None: ...

    decorated: Iterator[Any] = iter(
        (torch.no_grad()(nothing), torch.profiler.record_function("")(nothing))
    )
    return frozenset(each.__code__.co_filename for each in decorated)


def why_not_whole(**modules: Any) -> str:
    """Why modules of Nanotron cannot be computed in one function; empty where they can.

    Each must be what Nanotron defines: nobody watches it, and its forward is Nanotron's or ours.

    Args:
        modules: by the name that the reason calls each by. What is no module watches nothing.
    """
    for name, module in modules.items():
        if not isinstance(module, nn.Module):
            continue
        reason = why_not_past(module) or _why_foreign(type(module))
        if reason:
            return f"{name}: {reason}"
    return ""


def _why_foreign(kind: type[nn.Module]) -> str:
    if not kind.__module__.startswith("nanotron."):
        return f"it is a {kind.__module__}.{kind.__qualname__}, not a class of Nanotron's"
    code = getattr(kind.forward, "__code__", None)
    file = "" if code is None else code.co_filename
    if file.startswith((_folder("nanotron"), _folder("nanotron_fast"))):
        return ""
    if file in torch_decorators():
        return ""
    return f"the forward of {kind.__qualname__} was replaced by {file or 'somebody else'}"


def _folder(package: str) -> str:
    """Of a package that has been imported."""
    return os.path.dirname(str(sys.modules[package].__file__)) + os.sep
