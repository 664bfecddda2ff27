"""Makes the emulator Triton's GPU, for a run of pytest. `emulator.command` loads it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.nvidia.compiler import CUDABackend
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver

from nanotron_fast.kernels.attention import operators as attention
from nanotron_fast.kernels.runtime import occupancy

ARCHITECTURE = int(os.environ["EMULATOR_ARCH"])

# Changes of the texts of kernels that are loaded, which a test asks for.
edits: list[Callable[[bytes], bytes]] = []


def _text(backend: CUDABackend, text: str, *_: Any) -> bytes:
    """In place of a binary: the text itself, which is what the emulator loads."""
    return text.encode() + b"\0"


def _edited(load: Callable[..., Any]) -> Callable[..., Any]:
    def load_edited(name: str, text: bytes, *rest: Any) -> Any:
        for edit in edits:
            text = edit(text)
        return load(name, text, *rest)

    return load_edited


def _aligned(num_bytes: int, alignment: int, stream: int | None) -> Tensor:
    """Scratch memory for descriptors, which torch aligns on a GPU."""
    memory = torch.empty(num_bytes + alignment, dtype=torch.int8)
    first = -memory.data_ptr() % alignment
    return memory[first : first + num_bytes]


def _copied(frombuffer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Tables of addresses lie in memory of torch's, as on a GPU."""
    return lambda *arguments, **named: frombuffer(*arguments, **named).clone()


def pytest_configure(config: pytest.Config) -> None:
    assert not triton.knobs.runtime.interpret
    CUDABackend.make_cubin = _text
    active = CudaDriver()
    active.get_current_device = lambda: 0
    active.get_device_capability = lambda device=0: divmod(ARCHITECTURE, 10)
    active.get_current_stream = lambda device=0: 0
    active.utils.load_binary = _edited(active.utils.load_binary)
    driver.set_active(active)
    Autotuner._bench = lambda self, *arguments, config, **named: 1.0
    limit = occupancy.shared_memory_of(divmod(ARCHITECTURE, 10))
    occupancy.shared_memory_limit = lambda device: limit
    attention._scratch = _aligned
    torch.frombuffer = _copied(torch.frombuffer)
