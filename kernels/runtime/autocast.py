"""Autocast for functions that write their own backward: one cast where they begin.

Within such a function torch's autocast would cast the operands of each product by itself, and the
backward pass, which runs outside of it, would meet products of two dtypes. So the operands come in
as autocast makes them, and what is saved for backward is of one dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanotron_fast.kernels.runtime.main_grad import eager_main_grad


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for tensors of a device; never for those that have no memory."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def as_autocast(*operands: Tensor | None) -> tuple[Any, ...]:
    """Operands of products, the first of them a tensor, in the dtype of autocast where it is on.

    As torch does for a linear layer, all but fp64 are cast; gradients pass through the cast, to a
    `main_grad` too. Without autocast they are given back as they are.
    """
    device = operands[0].device if operands[0] is not None else torch.device("cpu")
    if not is_autocast(device):
        return operands
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(_cast(operand, dtype) for operand in operands)


def _cast(operand: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if operand is None or operand.dtype in (dtype, torch.float64):
        return operand
    low = operand.to(dtype)
    main_grad = eager_main_grad(operand)
    if main_grad is not None:
        low.main_grad = main_grad
    return low
