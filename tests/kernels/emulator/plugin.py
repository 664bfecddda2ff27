"""Makes the emulator Triton's GPU, for a run of pytest and the ranks that its tests start.

`emulator.command` loads it, and `tests.forks` where a process was started under the emulator.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
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
    set_up()


def set_up() -> None:
    """Puts the emulator in the place of Triton's driver, once in a process."""
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
    if ARCHITECTURE < 90:  # as on a GPU: the bulk copy engine came with sm_90
        attention._can_tma = lambda *tensors: False
    torch.frombuffer = _copied(torch.frombuffer)


def profile() -> dict[str, Counter[str]]:
    """Of each kernel that was launched until now, what its warps' accesses took, and the least.

    `sectors` are pieces of 32 bytes of global memory that were asked for, `bank_cycles` those of
    shared memory, without what the bulk copy engine and wgmma touch.
    """
    kernels: dict[str, Counter[str]] = {}
    for line in Path(os.environ["EMULATOR_PROFILE"]).read_text().splitlines():
        launch = json.loads(line)
        sums = kernels.setdefault(launch["kernel"], Counter())
        sums["launches"] += 1
        sums["instructions"] += launch["instructions"]
        for name in ("sectors", "bank_cycles"):
            taken, least = launch[name]
            sums[name] += taken
            sums[f"least_{name}"] += least
    return kernels


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if "EMULATOR_PROFILE" not in os.environ or os.environ.get("PYTEST_XDIST_WORKER"):
        return
    line = "{:28}{:>10}{:>14}{:>14}{:>8}{:>14}{:>8}".format
    terminalreporter.section("accesses to memory, beside the least that they could take")
    heads = ("kernel", "launches", "instructions", "sectors", "", "bank cycles", "")
    terminalreporter.write_line(line(*heads))
    for kernel, sums in sorted(profile().items()):
        ratios = [
            f"{sums[name] / sums[f'least_{name}']:.2f}" if sums[name] else ""
            for name in ("sectors", "bank_cycles")
        ]
        terminalreporter.write_line(
            line(
                kernel,
                sums["launches"],
                sums["instructions"],
                sums["sectors"],
                ratios[0],
                sums["bank_cycles"],
                ratios[1],
            )
        )
