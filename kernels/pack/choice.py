"""The ways to carry out a table of moves: plain torch, native code on the CPU, CUDA, Triton.

All of them have the native core check the table first, and give the same bytes.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nanotron_fast.kernels.pack.item import NUM_COLUMNS
from nanotron_fast.kernels.pack.reference import pack_reference
from nanotron_fast.kernels.pack.table import memories_of, tiles_of
from nanotron_fast.kernels.runtime import capture
from nanotron_fast.kernels.runtime.backend import explain as explain_backend
from nanotron_fast.kernels.runtime.backend import requested_backend


def _run_native(table: Tensor, sources: list[Tensor], destinations: list[Tensor]) -> None:
    from nanotron_fast import _C

    _C.pack(
        table.numpy(),
        memories_of(sources),
        memories_of(destinations),
        workers=torch.get_num_threads(),
    )


def _items_on(device: torch.device, items: bytes) -> Tensor:
    """A launch's items on a device, without waiting for it: the copy is ordered by the stream.

    Raises RuntimeError in a graph's capture: its replays would copy from memory long since reused.
    """
    host = torch.frombuffer(bytearray(items), dtype=torch.int64).view(-1, NUM_COLUMNS)
    if capture.is_capturing(device):
        raise RuntimeError(
            f"pack: {len(host)} moves are too many for a launch that a graph captures"
        )
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
    from nanotron_fast.kernels.pack import kernels

    items, num_tiles = tiles_of(table, sources, destinations)
    device = destinations[0].device
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernels.launch(_items_on(device, items), num_tiles)


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
    """Carries out a table (moves, columns) int64 on the CPU. All tensors are on one device."""
    if len(table) == 0:
        return
    path, _ = explain(destinations[0].device if destinations else torch.device("cpu"))
    if not destinations:  # refuses the table, which speaks of one
        path = "cpu"
    _RUNNERS[path](table, sources, destinations)
