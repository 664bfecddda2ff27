"""A table of moves in the memory of the host, and what the native core makes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanotron_fast.moves.row import NUM_COLUMNS, columns_of

# The codes of a table's dtype columns.
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def as_table(moves: Any) -> Tensor:
    """(moves, NUM_COLUMNS) int64 on the CPU, from a table of any kind, from Moves or from Rows.

    Raises ValueError.
    """
    if not isinstance(moves, Tensor):
        try:
            view = memoryview(moves)
        except TypeError:
            rows = [columns_of(move) for move in moves]
            return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, NUM_COLUMNS)
        if view.format not in ("q", "l") or view.itemsize != 8:
            raise ValueError(f"pack: a table of moves is int64, not {view.format!r}")
        moves = torch.frombuffer(view, dtype=torch.int64) if view.nbytes else torch.empty(0).long()
        moves = moves.reshape(view.shape)
    has_rows = moves.dim() == 2 and moves.shape[1] == NUM_COLUMNS
    is_flat = moves.dim() == 1 and moves.shape[0] % NUM_COLUMNS == 0
    if moves.dtype != torch.int64 or moves.device.type != "cpu" or not (has_rows or is_flat):
        raise ValueError(
            f"pack: a table of moves is int64 on the CPU with {NUM_COLUMNS} columns, not "
            f"{moves.dtype} {tuple(moves.shape)} on {moves.device}"
        )
    return moves.reshape(-1, NUM_COLUMNS).contiguous()


def memories_of(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """Address and bytes of each."""
    return [(tensor.data_ptr(), tensor.numel() * tensor.element_size()) for tensor in tensors]


def tiles_of(table: Tensor, sources: list[Tensor], destinations: list[Tensor]) -> tuple[bytes, int]:
    """The items of a launch and the number of their tiles. Raises PlanError."""
    from nanotron_fast import _C

    return _C.pack_tiles(table.numpy(), memories_of(sources), memories_of(destinations))
