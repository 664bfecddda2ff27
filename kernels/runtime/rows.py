"""Tensors as rows, which is how most kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor


def as_rows(tensor: Tensor) -> Tensor:
    """(..., cols) -> (rows, cols) whose elements lie side by side within a row."""
    rows = tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def with_stride(tensor: Tensor) -> tuple[Tensor, int]:
    """A tensor whose rows a kernel can walk over, and the elements from one row to the next.

    It is (..., cols) itself where it is contiguous: a kernel needs no view of it.
    """
    if tensor.is_contiguous():
        return tensor, tensor.shape[-1]
    rows = as_rows(tensor)
    return rows, rows.stride(0)


def as_row_of_ids(ids: Tensor) -> Tensor:
    """(...) of any integer dtype -> (ids,), contiguous, int32 or int64.

    Beside a narrower dtype torch wraps a number that it does not have: -100 is 156 in eight bits.
    """
    is_wide = ids.dtype in (torch.int32, torch.int64)
    ids = ids if is_wide else ids.long()
    return (ids if ids.ndim == 1 else ids.reshape(-1)).contiguous()


def empty_rows(tensor: Tensor) -> Tensor:
    """Memory of a tensor's shape and dtype, contiguous."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
