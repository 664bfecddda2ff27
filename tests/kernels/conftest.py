"""Every kernel test runs once for each path that this machine has."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from tests.kernels.poisoning import poison_allocations


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that nobody has written holds NaN, so that what a kernel leaves out shows.

    On a CPU torch does it, where deterministic algorithms are on. On a GPU those would rule out
    the very kernels that attention prefers, cuDNN's and FlashAttention 3: there what allocates for
    us is replaced.
    """
    if torch.cuda.is_available():
        poison_allocations(monkeypatch)
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_path(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> torch.device:
    """The kernels themselves: compiled on a GPU, interpreted on a CPU. Gives the device."""
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "triton")
    return device


@pytest.fixture
def torch_path(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> torch.device:
    """The references. Gives the device."""
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "torch")
    return device


@pytest.fixture(params=["triton", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both paths, one after the other."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # a graph of the other path would serve
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", request.param)
    return str(request.param)
