"""The ways to carry out a table of moves: plain torch, native code on the CPU, CUDA, Triton.

All of them have the native core check the table first, and give the same bytes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from nanotron_fast.kernels.runtime.backend import explain as explain_backend
from nanotron_fast.kernels.runtime.backend import requested_backend

# The codes of a table's dtype columns.
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
NUM_COLUMNS = 15
# Columns of a table: source, its offset, destination, its offset, then as these slices say.
SIZES, SOURCE_STRIDES, DESTINATION_STRIDES = slice(4, 7), slice(7, 10), slice(10, 13)


def table_of(moves: Any) -> Tensor:
    """(moves, 15) int64 on the CPU, from a table of any kind or from Move objects.

    Raises ValueError.
    """
    if not isinstance(moves, Tensor):
        try:
            view = memoryview(moves)
        except TypeError:
            rows = [_row_of(move) for move in moves]
            return torch.tensor(rows, dtype=torch.int64).reshape(-1, NUM_COLUMNS)
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


def _row_of(move: Any) -> list[int]:
    return [
        move.source,
        move.source_offset,
        move.destination,
        move.destination_offset,
        *move.sizes,
        *move.source_strides,
        *move.destination_strides,
        int(move.source_dtype),
        int(move.destination_dtype),
    ]


def _memories(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """Address and bytes of each."""
    return [(tensor.data_ptr(), tensor.numel() * tensor.element_size()) for tensor in tensors]


def tiles_of(table: Tensor, sources: list[Tensor], destinations: list[Tensor]) -> tuple[bytes, int]:
    """The items of a launch and the number of their tiles. Raises PlanError."""
    from nanotron_fast import _C

    return _C.pack_tiles(table.numpy(), _memories(sources), _memories(destinations))


def cast_reference(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds to nearest even; NaN has the bits that csrc/cast gives it on every device."""
    result = values.to(dtype)
    if values.dtype == dtype:
        return result
    nan = values.isnan()
    if dtype == torch.bfloat16:
        return result.view(torch.int16).masked_fill(
            nan, 0x7FC0 if values.dtype == torch.float16 else -1
        ).view(dtype)  # fmt: skip
    if values.dtype == torch.float16:
        bits = values.view(torch.int16).int()
        quiet = ((bits & 0x8000) << 16) | 0x7FC00000 | ((bits & 0x3FF) << 13)
        return torch.where(nan, quiet, result.view(torch.int32)).view(dtype)
    if dtype == torch.float32:
        return result
    if values.dtype == torch.bfloat16:
        bits = values.view(torch.int16).int() << 16
    else:
        bits = values.view(torch.int32)
    quiet = ((bits >> 16) & 0x8000) | 0x7E00 | ((bits >> 13) & 0x3FF)
    return torch.where(nan, quiet.to(torch.int16), result.view(torch.int16)).view(dtype)


def pack_reference(table: Tensor, sources: list[Tensor], destinations: list[Tensor]) -> None:
    """One strided copy after the other, in plain torch."""
    tiles_of(table, sources, destinations)
    for row in table.tolist():
        source, source_offset, destination, destination_offset = row[:4]
        data = destinations[destination].reshape(-1).view(torch.uint8)
        dtype = DTYPES[row[14]]
        target, span = _elements(data, destination_offset, dtype, row, DESTINATION_STRIDES)
        if source < 0:
            target.zero_()
        else:
            bytes_read = sources[source].reshape(-1).view(torch.uint8)
            values, _ = _elements(bytes_read, source_offset, DTYPES[row[13]], row, SOURCE_STRIDES)
            target.copy_(cast_reference(values, dtype))
        data[destination_offset : destination_offset + span.numel()] = span


def _elements(
    data: Tensor, offset: int, dtype: torch.dtype, row: list[int], strides: slice
) -> tuple[Tensor, Tensor]:
    """A copy of a move's box, and the bytes from its first element to its last, which hold it."""
    last = sum((n - 1) * stride for n, stride in zip(row[SIZES], row[strides], strict=True))
    # A copy is aligned; where it comes from need not be.
    span = data[offset : offset + (last + 1) * dtype.itemsize].clone()
    return span.view(dtype).as_strided(row[SIZES], row[strides]), span


def _run_native(table: Tensor, sources: list[Tensor], destinations: list[Tensor]) -> None:
    from nanotron_fast import _C

    _C.pack(
        table.numpy(),
        _memories(sources),
        _memories(destinations),
        workers=torch.get_num_threads(),
    )


def _items_on(device: torch.device, items: bytes) -> Tensor:
    """A launch's items on a device, without waiting for it: the copy is ordered by the stream.

    Raises RuntimeError in a graph's capture: its replays would copy from memory long since reused.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"pack: {len(items) // (8 * 16)} moves are too many for a launch that a graph captures"
        )
    host = torch.frombuffer(bytearray(items), dtype=torch.int64).view(-1, 16)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _run_cuda(table: Tensor, sources: list[Tensor], destinations: list[Tensor]) -> None:
    from nanotron_fast import _cuda

    items, num_tiles = tiles_of(table, sources, destinations)
    device = destinations[0].device
    with torch.cuda.device(device):
        where = {
            "num_tiles": num_tiles,
            "device": device.index,
            "stream": torch.cuda.current_stream(device).cuda_stream,
        }
        if len(table) <= _cuda.MAX_INLINE_ITEMS:
            _cuda.launch_inline(items, **where)
        else:
            on_device = _items_on(device, items)
            _cuda.launch(on_device.data_ptr(), num_items=len(table), **where)


def _run_triton(table: Tensor, sources: list[Tensor], destinations: list[Tensor]) -> None:
    from nanotron_fast.kernels.pack import kernels as pack_kernel

    items, num_tiles = tiles_of(table, sources, destinations)
    device = destinations[0].device
    with torch.cuda.device(device if device.type == "cuda" else -1):
        pack_kernel.launch(_items_on(device, items), num_tiles)


@functools.cache
def _cuda_problem(index: int) -> str:
    """Why the extension does not serve a device; empty where it does."""
    try:
        from nanotron_fast import _cuda
    except ImportError:
        return "built without CUDA"
    return _cuda.problem_of(index)


_RUNNERS = {
    "torch": pack_reference,
    "cpu": _run_native,
    "cuda": _run_cuda,
    "triton": _run_triton,
}


def explain(device: torch.device | str) -> tuple[str, str]:
    """The path that tensors of a device take, "cuda", "triton", "cpu" or "torch", and why."""
    device = torch.device(device)
    path, why = explain_backend(device.type)
    if requested_backend() != "auto":
        return path, why
    if device.type == "cpu":
        return "cpu", "native code"
    if device.type != "cuda":
        return path, why
    problem = _cuda_problem(torch.cuda.current_device() if device.index is None else device.index)
    return ("cuda", "compiled for the GPU") if not problem else (path, f"{why}; {problem}")


def run(table: Tensor, sources: list[Tensor], destinations: list[Tensor]) -> None:
    """Carries out a table (moves, 15) int64 on the CPU. All tensors are on one device."""
    if len(table) == 0:
        return
    path, _ = explain(destinations[0].device if destinations else torch.device("cpu"))
    if not destinations:  # refuses the table, which speaks of one
        path = "cpu"
    _RUNNERS[path](table, sources, destinations)
