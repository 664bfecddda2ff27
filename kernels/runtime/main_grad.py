"""Main gradients: fp32 sums that a parameter carries, and fused functions add to by themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def main_gradients(*parameters: Tensor | None) -> Sequence[Tensor | None]:
    """The `main_grad` of each parameter, fp32 and of its shape; None where nobody has set one."""
    return [getattr(parameter, "main_grad", None) for parameter in parameters]


def eager_main_grad(parameter: Tensor) -> Tensor | None:
    """The same of one parameter; None under torch.compile, where its gradient is a `grad`."""
    return None if torch.compiler.is_compiling() else main_gradients(parameter)[0]
