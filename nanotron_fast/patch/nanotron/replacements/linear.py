"""Column and row linear layers over a tensor-parallel group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nanotron_fast.parallel.linear import column_linear, row_linear
from nanotron_fast.patch.nanotron.targets import DropInOptions

# `async_communication` is not passed on: ours overlaps what is worth it, and counts the same.


def _mode(tp_mode: Any) -> str:
    """Our name of a TensorParallelLinearMode of Nanotron's, ALL_REDUCE or REDUCE_SCATTER."""
    return str(tp_mode.name).lower()


def column(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`column_linear`."""

    def replacement(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: Any,
        tp_mode: Any,
        async_communication: bool,
        tp_recompute_allgather: bool = True,
    ) -> Tensor:
        return column_linear(
            input,
            weight,
            bias,
            group=group,
            mode=_mode(tp_mode),
            recompute_allgather=tp_recompute_allgather,
        )

    return replacement


def row(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`row_linear`."""

    def replacement(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: Any,
        tp_mode: Any,
        async_communication: bool,
    ) -> Tensor:
        if async_communication and _mode(tp_mode) == "all_reduce":
            raise ValueError("async_communication is not supported for ALL_REDUCE mode")
        return row_linear(input, weight, bias, group=group, mode=_mode(tp_mode))

    return replacement
