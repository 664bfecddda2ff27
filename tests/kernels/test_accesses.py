"""Accesses to memory ask for no more than they need, as a profile on the emulator says.

These tests run there: `python -m tests.kernels.emulator --profile tests/kernels/test_accesses.py`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanotron_fast.kernels.attention import attention
from nanotron_fast.kernels.cross_entropy import vocab_parallel_cross_entropy
from nanotron_fast.kernels.embedding import vocab_parallel_embedding
from nanotron_fast.kernels.glu import glu
from nanotron_fast.kernels.matmul import matmul_glu, matmul_rope
from nanotron_fast.kernels.optimizer import accumulate_, adamw_step_
from nanotron_fast.kernels.pack import pack_qkv
from nanotron_fast.kernels.rms_norm import rms_norm
from nanotron_fast.kernels.rope import rope_qkv, rope_tables

IS_HERE = "EMULATOR_PROFILE" in os.environ
pytestmark = pytest.mark.skipif(not IS_HERE, reason="needs the emulator, with --profile")
# Beside the least: rows begin in the middle of a sector here and there. The rotary tables in fp32
# are read as the bf16 of a product lie, half a sector at a time, of which the cache has the other.
MOST, MOST_OF = 1.02, {"rope_kernel": 1.2}


def random(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def step(operation: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> None:
    """Forward and backward."""
    given = [each.requires_grad_() for each in inputs]
    results = operation(*given)
    results = results if isinstance(results, tuple) else (results,)
    torch.autograd.backward(results, [torch.randn_like(each) for each in results])


def tables() -> tuple[Tensor, Tensor]:
    return rope_tables(128, 64, device=torch.device("cpu"))


def norm() -> None:
    step(
        lambda x, weight, residual: rms_norm(x, weight, eps=1e-5, residual=residual),
        random(16, 4096),
        random(4096),
        random(16, 4096),
    )


def rope() -> None:
    step(lambda qkv: rope_qkv(qkv, *tables(), 8, 2, 128), random(64, 12 * 128))


def loss() -> None:
    target = torch.randint(32000, (4,))
    step(lambda logits: vocab_parallel_cross_entropy(logits, target), random(4, 32000))


def embedding() -> None:
    ids = torch.randint(500, (64,))
    step(lambda weight: vocab_parallel_embedding(ids, weight), random(500, 2048))


def scores() -> None:
    step(attention, random(1, 256, 4, 128), random(1, 256, 2, 128), random(1, 256, 2, 128))


def products() -> None:
    matmul_glu(random(128, 256), random(512, 256))
    qkv_weight = random(8 * 128, 256)
    matmul_rope(random(64, 256), qkv_weight, None, *tables(), 4, 2, 128)


def lists() -> None:
    params = [random(64, 1024), random(1024)]
    states = [[torch.zeros(each.shape) for each in params] for _ in range(3)]
    gradients = [torch.randn(each.shape) for each in params]
    steps = torch.zeros(())
    adamw_step_(states[2], gradients, *states[:2], steps, lr=1e-3, copies=params)
    accumulate_(gradients, params)


def packing() -> None:
    pack_qkv(random(512, 256), random(128, 256), random(128, 256), 2)


CASES: dict[str, Callable[[], None]] = {
    "rms_norm": norm,
    "glu": lambda: step(glu, random(16, 8192)),
    "rope": rope,
    "cross_entropy": loss,
    "embedding": embedding,
    "attention": scores,
    "matmul": products,
    "lists": lists,
    "pack": packing,
}


@pytest.mark.parametrize("name", CASES)
def test_accesses_take_the_least(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.kernels.emulator import plugin

    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "triton")
    before = plugin.profile()
    CASES[name]()
    after = plugin.profile()
    launched = [kernel for kernel in after if after[kernel] != before.get(kernel)]
    assert launched
    for kernel in launched:
        sums = after[kernel] - before.get(kernel, Counter())
        for what in ("sectors", "bank_cycles"):
            most = MOST_OF.get(kernel, MOST) * sums[f"least_{what}"]
            assert sums[what] <= most, (kernel, sums)
