"""Stand-ins for symmetric memory on a CPU: its fused products, its topology, its steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.distributed import _symmetric_memory

from nanotron_fast.parallel import symmetric
from nanotron_fast.parallel.symmetric import Facts


@contextmanager
def fused_products() -> Iterator[list[str]]:
    """torch's fused products on a CPU, by their plain path; which of them were called."""
    calls: list[str] = []

    def gather(*args: Any, **kwargs: Any) -> Any:
        calls.append("gather")
        return _symmetric_memory._fused_all_gather_matmul_fallback(*args, **kwargs)

    def scatter(*args: Any) -> Any:
        calls.append("scatter")
        return _symmetric_memory._fused_matmul_reduce_scatter_fallback(*args)

    with torch.library._scoped_library("symm_mem", "IMPL") as library:
        library.impl("fused_all_gather_matmul", gather, "CPU")
        library.impl("fused_matmul_reduce_scatter", scatter, "CPU")
        yield calls


@contextmanager
def agreed(is_used: bool) -> Iterator[None]:
    """What the ranks of every group have agreed on."""
    with mock.patch.object(symmetric, "is_used", return_value=is_used):
        yield


def facts(rank: int, size: int, **others: Any) -> Facts:
    """Those of a rank of a host all of whose devices reach each other."""
    devices = frozenset(f"device {i}" for i in range(size))
    usual = Facts("auto", None, False, "host", f"device {rank}", rank, devices)
    return usual._replace(**others)
