"""Allocations that hold NaN, or the largest integer, until somebody writes them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

_ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def wrapper(*arguments: object, **named: object) -> Tensor:
        tensor = allocate(*arguments, **named)
        # A tracer's allocation has no memory, and what it compiles allocates by itself.
        if torch.compiler.is_compiling() or tensor.device.type == "meta" or not tensor.numel():
            return tensor
        with torch.no_grad():
            if tensor.dtype == torch.bool:
                tensor.fill_(True)
            elif tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(float("nan"))
            else:
                tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return wrapper


def poison_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, whatever allocates from Python gives poisoned memory."""
    for owner, name in _ALLOCATORS:
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
