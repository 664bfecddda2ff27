"""The emulator sees what a GPU would stop at, or compute something else by.

These tests run under it: `python -m tests.kernels.emulator tests/kernels/test_emulator.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

IS_HERE = "EMULATOR_ARCH" in os.environ
pytestmark = pytest.mark.skipif(not IS_HERE, reason="needs the emulator")


@triton.jit
def copy_kernel(from_ptr, to_ptr, offset, size, HINT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = from_ptr + offset + at
    if HINT:
        source = tl.multiple_of(source, HINT)
    tl.store(to_ptr + at, tl.load(source, mask=at < size))


@triton.jit
def number_kernel(numbers_ptr, factor, READS: tl.constexpr, BLOCK: tl.constexpr):
    number = (tl.program_id(0) * factor).to(tl.float32)
    if READS:
        number += tl.load(numbers_ptr + tl.arange(0, BLOCK))
    tl.store(numbers_ptr + tl.arange(0, BLOCK), number)


@triton.jit
def turned_kernel(from_ptr, to_ptr, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    matrix = tl.load(from_ptr + rows * SIZE + columns)
    tl.store(to_ptr + columns * SIZE + rows, matrix)


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, DEPTH: tl.constexpr, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    sums = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for start in tl.range(0, DEPTH, SIZE, num_stages=3):
        a = tl.load(a_ptr + rows * DEPTH + start + columns)
        b = tl.load(b_ptr + (start + rows) * SIZE + columns)
        sums = tl.dot(a, b, sums)
    tl.store(c_ptr + rows * SIZE + columns, sums)


@pytest.fixture
def edits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """Changes of the kernels that a test loads first."""
    from tests.kernels.emulator import plugin

    for kernel in (turned_kernel, product_kernel):
        kernel.device_caches.clear()
    yield plugin.edits
    plugin.edits.clear()
    for kernel in (turned_kernel, product_kernel):
        kernel.device_caches.clear()


def turn() -> tuple[torch.Tensor, torch.Tensor]:
    matrix = torch.randn(64, 64)
    turned = torch.full_like(matrix, torch.nan)
    turned_kernel[(1,)](matrix, turned, SIZE=64, num_warps=4)
    return turned, matrix.T


def multiply() -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.randn(64, 512).bfloat16(), torch.randn(512, 64).bfloat16()
    c = torch.empty(64, 64)
    product_kernel[(1,)](a, b, c, DEPTH=512, SIZE=64, num_warps=4)
    return c, a.float() @ b.float()


def copy(
    source: torch.Tensor,
    target: torch.Tensor,
    offset: int,
    size: int,
    hint: int = 0,
    blocks: int = 2,
) -> None:
    copy_kernel[(blocks,)](source, target, offset, size, HINT=hint, BLOCK=512, num_warps=1)


def test_a_copy_is_one() -> None:
    source, target = torch.randn(1027), torch.empty(1024)
    copy(source, target, 3, 1024)
    assert torch.equal(target, source[3:])


def test_reading_beyond_a_tensor() -> None:
    words = (
        r"out of bounds: bytes 4080 to 4096 of an allocation of 4088; in copy_kernel, block 1,0,0"
    )
    with pytest.raises(
        RuntimeError, match=rf"{words}, thread 31, line \d+ of its PTX: .*ld\.global"
    ):
        copy(torch.randn(1022), torch.empty(1024), 0, 1024)


def test_writing_beyond_a_tensor() -> None:
    with pytest.raises(RuntimeError, match=r"out of bounds: .* allocation of 2044; .*st\.global"):
        copy(torch.randn(512), torch.empty(1023)[512:].clone(), 0, 512, blocks=1)


def test_freed_memory_is_out_of_bounds() -> None:
    source = torch.randn(1 << 20)
    address = source.data_ptr()
    del source

    class Gone:
        dtype = torch.float32

        def data_ptr(self) -> int:
            return address

    with pytest.raises(RuntimeError, match="out of bounds"):
        copy_kernel[(1,)](Gone(), torch.empty(512), 0, 512, HINT=0, BLOCK=512, num_warps=1)


def test_a_promise_that_is_not_kept() -> None:
    with pytest.raises(RuntimeError, match="misaligned: 16 bytes at 0x"):
        copy(torch.randn(1026), torch.empty(1024), 2, 1024, hint=16)


def test_blocks_that_touch_one_place() -> None:
    numbers = torch.zeros(512)
    number_kernel[(2,)](numbers, 0, READS=False, BLOCK=512)  # all write the same
    with pytest.raises(RuntimeError, match="race: others write other bytes to one place; "):
        number_kernel[(2,)](numbers, 2, READS=False, BLOCK=512)
    with pytest.raises(RuntimeError, match=r"race: byte \d+ of .* 2048, with block [01]; "):
        number_kernel[(2,)](numbers, 2, READS=True, BLOCK=512)


def test_each_launch_asks_for_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    first = set()
    for seed in range(8):
        monkeypatch.setenv("EMULATOR_SEED", str(seed))
        with pytest.raises(RuntimeError, match=r"race: byte \d+ of .*, with block [01]; ") as fault:
            number_kernel[(2,)](torch.zeros(512), 2, READS=True, BLOCK=512)
        first |= {*re.findall("with block ([01])", str(fault.value))}
    assert first == {"0", "1"}


def test_warps_that_no_barrier_parts(edits: list) -> None:
    turned, expected = turn()
    assert torch.equal(turned, expected)
    turned_kernel.device_caches.clear()
    edits.append(lambda text: re.sub(rb"bar\.sync\s+0;", b"", text))
    with pytest.raises(RuntimeError, match=r"race: byte .* of shared memory, with a"):
        turn()


def test_copies_that_are_not_waited_for(edits: list) -> None:
    product, expected = multiply()
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-4)
    product_kernel.device_caches.clear()
    edits.append(lambda text: re.sub(rb"cp\.async\.wait_group\s+\d+;", b"", text))
    with pytest.raises(RuntimeError, match=r"race: byte .* of shared memory is still copied to"):
        multiply()


def test_an_unknown_instruction(edits: list) -> None:
    edits.append(lambda text: text.replace(b"ret;", b"brkpt; ret;"))
    with pytest.raises(RuntimeError, match=r"line \d+ of the PTX: unknown instruction brkpt$"):
        turn()
