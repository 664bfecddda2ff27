"""What the tests of the packer share: its paths, and the check against the numpy reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanotron_fast.kernels import pack
from nanotron_fast.moves import numpy_engine as reference
from nanotron_fast.moves.row import FILL

gpu = pytest.mark.gpu
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PATHS = ["native", "torch", "triton", pytest.param("cuda", marks=(gpu, no_gpu))]


def choose_path(name: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Asks for one of PATHS, and gives the device whose tensors take it; skips where none does.

    Triton's is interpreted without a GPU.
    """
    backend = name if name in ("torch", "triton") else "auto"
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", backend)
    on_gpu = name == "cuda" or (name == "triton" and torch.cuda.is_available())
    device = torch.device("cuda" if on_gpu else "cpu", 0 if on_gpu else None)
    wanted = "cpu" if name == "native" else name
    path, why = pack.explain(device)
    if path != wanted:
        pytest.skip(why)
    return device


def run_bytes(moves, sources, sizes, device, shift=0):
    """What destinations of these sizes hold after a run; they held sevens. All begin at `shift`."""
    on_device = []
    for data in sources:
        on_device.append(torch.zeros(shift + len(data), dtype=torch.uint8, device=device)[shift:])
        on_device[-1].copy_(torch.from_numpy(data))
    written = [
        torch.full((shift + size,), 7, dtype=torch.uint8, device=device)[shift:] for size in sizes
    ]
    pack.run(moves, on_device, written)
    return [tensor.cpu().numpy() for tensor in written]


def check(moves, sources, sizes, device, shift=0):
    """Runs moves and compares with the reference."""
    expected = [np.full(size, 7, np.uint8) for size in sizes]
    for move in moves:
        source = None if move.source == FILL else sources[move.source]
        reference.apply_move(move, source, expected[move.destination])
    found = run_bytes(moves, sources, sizes, device, shift)
    for wanted, got in zip(expected, found, strict=True):
        assert np.array_equal(wanted, got)


def random_bytes(size, seed=0):
    return np.frombuffer(np.random.default_rng(seed).bytes(size), np.uint8).copy()
