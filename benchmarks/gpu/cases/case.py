"""A case is one operation at one shape, in several variants; a setting says where and how large."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.gpu.context import Context

T = TypeVar("T")
SIZES = ("real", "tiny", "cpu", "swept")


@dataclass(frozen=True)
class Setting:
    """Device, dtypes and size of the cases."""

    device: torch.device
    dtype: torch.dtype
    product_dtype: torch.dtype  # of what multiplies: the interpreter gets bf16 wrong there
    size: str
    compiler: dict[str, str]

    @classmethod
    def of(cls, context: Context) -> Setting:
        return cls(
            context.device,
            context.dtype(),
            context.dtype(multiplies=True),
            "tiny" if context.dry else "real",
            context.compiler,
        )

    @classmethod
    def on_cpu(cls) -> Setting:
        """For the references on a CPU: fp32, and large enough to be timed."""
        fp32 = torch.float32
        return cls(torch.device("cpu"), fp32, fp32, "cpu", {"backend": "aot_eager"})

    def to_sweep(self) -> Setting:
        return replace(self, size="swept")

    def pick(self, real: T, tiny: T, cpu: T, swept: T | None = None) -> T:
        """Of a sweep's sizes, those of a real run where there are no others."""
        sizes = {"real": real, "tiny": tiny, "cpu": cpu, "swept": swept or real}
        return sizes[self.size]

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # A backward that is timed runs more than once over the same forward.
        torch._functorch.config.donated_buffer = False
        return torch.compile(function, dynamic=False, **self.compiler)

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """A leaf that requires a gradient."""
        values = torch.randn(shape, device=self.device) * scale
        return values.to(dtype or self.dtype).requires_grad_()


@dataclass
class Case:
    """One operation at one shape.

    `tensors` are made anew for each variant, so that one that works in place cannot disturb
    another. `bytes_forward` and so on are the floors: what must move, or be computed, at least.
    """

    operation: str
    shape: str
    tensors: Callable[[], list[Tensor]]
    # Name -> function of the tensors; the first is the reference.
    variants: dict[str, Callable[..., Tensor | Sequence[Tensor]]]
    bytes_forward: int | None = None
    bytes_backward: int | None = None
    flops_forward: int | None = None
    flops_backward: int | None = None
    # Of the reference's norm.
    tolerance: float = 2e-2
    # Forward and backward are timed as one where backward may run once only.
    is_joint: bool = False
    # Variants that compute something else, timed for comparison, beside the first of ours.
    unlike: tuple[str, ...] = ()
    absent: dict[str, str] = field(default_factory=dict)
    # What a variant runs on where that is neither a kernel in Triton nor plain torch.
    paths: dict[str, str] = field(default_factory=dict)

    def add_peer(self, name: str, module: str, attribute: str, call: Callable[..., Any]) -> Case:
        """`call(function, *tensors)` as a variant, or a note where the function is not there."""
        function = peer(module, attribute)
        if function is None:
            self.absent[name] = f"{module}.{attribute} is not there, or does not import"
        else:
            self.variants[name] = partial(call, function)
        return self


def peer(module: str, name: str) -> Callable[..., Any] | None:
    """A function of another package, or None where it is not installed or does not import."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:  # peers fail in many ways where a GPU or a dependency is missing
        return None
