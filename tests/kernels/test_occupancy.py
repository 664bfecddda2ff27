"""How many programs fit on a GPU, on made-up GPUs; and how the norm's backward pass uses it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nanotron_fast.kernels.rms_norm import operators, rms_norm
from nanotron_fast.kernels.runtime import capture, occupancy, tuning
from nanotron_fast.kernels.runtime.sizes import next_power_of_2, unit_of

H100 = SimpleNamespace(
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    shared_memory_per_multiprocessor=233472,
    shared_memory_per_block_optin=232448,
)
GPU = torch.device("cuda", 0)


class Kernel:
    """A kernel that is compiled to a binary of given needs, and counts how often."""

    def __init__(self, registers: int, shared: int, num_warps: int) -> None:
        self.fn, self.__name__ = object(), "walk"
        self.needs = (registers, shared, num_warps)
        self.compiled: list[dict] = []

    def warmup(self, *arguments, grid, **named) -> SimpleNamespace:
        self.compiled.append(named)
        registers, shared, num_warps = self.needs
        metadata = SimpleNamespace(shared=shared, num_warps=num_warps)
        binary = SimpleNamespace(metadata=metadata, module=None)
        binary._init_handles = lambda: setattr(binary, "n_regs", registers)
        return binary


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H100)
    monkeypatch.setattr(occupancy, "_resident", {})


# By hand: a warp takes ceil(registers * 32 / 256) * 256 registers of its scheduler's 16384.
@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "expected"),
    [
        (186, 32792, 4, 2),  # 6144 a warp, 2 on a scheduler, 8 warps in all
        (168, 32792, 4, 3),  # 5376 a warp, 3 on a scheduler
        (169, 32792, 4, 2),  # one more: 5632 a warp, 2 on a scheduler
        (32, 98328, 4, 2),  # 233472 bytes hold two of 98328 + 1024
        (32, 0, 4, 16),  # 64 warps
        (32, 0, 8, 8),
        (64, 32768, 32, 1),
        (255, 196648, 8, 1),
        (255, 0, 16, 1),  # more than fits is one, which Triton then refuses by itself
    ],
)
def test_programs_of_a_multiprocessor(registers, shared, num_warps, expected) -> None:
    assert occupancy.programs_per_multiprocessor(registers, shared, num_warps, H100) == expected


def test_a_configuration_is_compiled_once(h100) -> None:
    kernel = Kernel(186, 32792, 4)
    arguments = (torch.bfloat16, None, torch.float32, 4096, 128)
    constants = {"STAGES": 3, "num_warps": 4}
    for _ in range(3):
        assert occupancy.resident_programs(kernel, arguments, constants, GPU) == 2 * 132
    # The very options of a launch: other ones would be another binary.
    assert kernel.compiled == [{**constants, "enable_fp_fusion": True}]


def test_a_tuple_of_numbers_is_one_as_its_numbers_are(h100) -> None:
    kernel = Kernel(186, 32792, 4)
    for pair in ((4096, 128), (8192, 16)):
        assert occupancy.resident_programs(kernel, (torch.float32, pair), {}, GPU) == 2 * 132
    assert len(kernel.compiled) == 1
    for pair in ((4096, 1), (4097, 128), (4096, 2**31)):
        occupancy.resident_programs(kernel, (torch.float32, pair), {}, GPU)
    assert len(kernel.compiled) == 4


def test_a_capture_compiles_nothing_that_it_would_load(h100, monkeypatch) -> None:
    kernel = Kernel(186, 32792, 4)
    with monkeypatch.context() as capturing:
        capturing.setattr(capture, "is_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="a CUDA graph captures walk, of a kind that is not"):
            occupancy.resident_programs(kernel, (torch.float32, 4096), {}, GPU)
    counted = occupancy.resident_programs(kernel, (torch.float32, 4096), {}, GPU)
    monkeypatch.setattr(capture, "is_capturing", lambda device: True)
    assert occupancy.resident_programs(kernel, (torch.float32, 4096), {}, GPU) == counted


@pytest.mark.parametrize(
    "changed",
    [
        (torch.float32, None, torch.float32, 4096, 128),
        (torch.bfloat16, torch.float32, torch.float32, 4096, 128),
        (torch.bfloat16, None, torch.float32, 4097, 128),
        (torch.bfloat16, None, torch.float32, 4096, 1),
        (torch.bfloat16, None, torch.float32, 4096, 2**31),
    ],
    ids=["dtype", "none", "indivisible", "one", "wide"],
)
def test_another_binary_is_counted_for_itself(h100, changed) -> None:
    kernel = Kernel(186, 32792, 4)
    first = (torch.bfloat16, None, torch.float32, 4096, 128)
    assert occupancy.resident_programs(kernel, first, {}, GPU) == 2 * 132
    kernel.needs = (128, 32792, 4)
    assert occupancy.resident_programs(kernel, changed, {}, GPU) == 4 * 132
    same = (torch.bfloat16, None, torch.float32, 8192, 256)
    assert occupancy.resident_programs(kernel, same, {}, GPU) == 2 * 132
    assert len(kernel.compiled) == 2


def test_a_cpu_has_a_few_programs_and_compiles_nothing() -> None:
    kernel = Kernel(186, 32792, 4)
    assert occupancy.resident_programs(kernel, (), {}, torch.device("cpu")) == 4
    assert kernel.compiled == []


def test_shared_memory_of_a_program(monkeypatch) -> None:
    def limit(**properties) -> int:
        given = SimpleNamespace(**properties)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: given)
        return occupancy.shared_memory_limit(GPU)

    assert limit(major=8, minor=0, shared_memory_per_block_optin=150000) == 150000
    assert limit(major=8, minor=0) == 166912
    assert limit(major=8, minor=9) == limit(major=12, minor=0) == 101376
    assert limit(major=9, minor=0) == limit(major=10, minor=0) == 232448
    assert occupancy.shared_memory_limit(torch.device("cpu")) == 101376


@pytest.mark.parametrize(
    ("limit", "hidden", "tensors", "size", "expected"),
    [
        (232448, 4096, 3, 2, 3),
        (232448, 8192, 3, 4, 3),
        (166912, 8192, 3, 4, 2),
        (101376, 8192, 3, 4, 2),
        (101376, 8192, 3, 2, 3),
        (65536, 8192, 3, 4, 1),
        (232448, 16384, 2, 2, 3),
        (232448, 16384, 3, 2, 3),
        (166912, 16384, 3, 2, 1),  # one copy would help nothing
        (232448, 16384, 2, 4, 1),
        (232448, 4104, 2, 2, 3),
        (232448, 4100, 2, 2, 1),  # copies of 8 bytes
        (232448, 4100, 2, 4, 3),
    ],
)
def test_stages_of_the_norm_fit_in_shared_memory(
    monkeypatch, limit, hidden, tensors, size, expected
) -> None:
    monkeypatch.setattr(occupancy, "shared_memory_limit", lambda device: limit)
    cols = next_power_of_2(hidden)
    rows = operators._BackwardBlocks.rule(cols, size).rows
    block_bytes = tensors * rows * cols * size
    assert operators._stages(block_bytes, cols, unit_of(hidden, 0) * size, GPU) == expected
    assert (expected - 1) * block_bytes < limit


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_grid_of_a_real_gpu_fills_it(monkeypatch) -> None:
    counted = []
    real = occupancy.resident_programs

    def count(*arguments) -> int:
        counted.append(real(*arguments))
        return counted[-1]

    monkeypatch.setattr(occupancy, "resident_programs", count)
    tuning.forget()
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "triton")
    x = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    rms_norm(x, weight).backward(torch.randn_like(x))
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    assert counted[0] % multiprocessors == 0
    assert multiprocessors <= counted[0] <= 16 * multiprocessors
