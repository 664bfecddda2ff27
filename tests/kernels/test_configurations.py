"""Every configuration that a launch may be given, as it is compiled, at widths of real models.

The other tests run what the rules give for small sizes. These run what a sweep times beside it, and
all of the tables of the kernels that Triton tunes: in two orders of blocks and warps, which must
give the same bits, at aligned and at odd addresses, for which others are compiled.

They need the emulator: `python -m tests.kernels.emulator tests/kernels/test_configurations.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from nanotron_fast.kernels.attention import attention, configs
from nanotron_fast.kernels.cross_entropy import vocab_parallel_cross_entropy
from nanotron_fast.kernels.embedding import vocab_parallel_embedding
from nanotron_fast.kernels.glu import glu
from nanotron_fast.kernels.matmul import kernels as matmul
from nanotron_fast.kernels.matmul import matmul_glu, matmul_rope
from nanotron_fast.kernels.optimizer import accumulate_, adamw_step_, clip_grad_norm_
from nanotron_fast.kernels.pack import pack_qkv
from nanotron_fast.kernels.rms_norm import rms_norm
from nanotron_fast.kernels.rope import rope_qkv, rope_tables
from nanotron_fast.kernels.rope.normed import rope_normed
from nanotron_fast.kernels.runtime import occupancy, tuning
from tests.kernels.checks import assert_close
from tests.kernels.operations import run

pytestmark = pytest.mark.skipif("EMULATOR_ARCH" not in os.environ, reason="needs the emulator")

BF16, FP32 = torch.bfloat16, torch.float32
TABLES = {configs.ForwardBlocks: "FORWARD", configs.DqBlocks: "DQ", configs.DkvBlocks: "DKV"}
DOCUMENTS = {"cu_seqlens": torch.tensor([0, 1, 1, 66, 150], dtype=torch.int32)}
KINDS = {"dense": {}, "documents": DOCUMENTS, "options": {"window": 50, "softcap": 4.0} | DOCUMENTS}
# Heads of queries and of keys, head_dim, the share of it that turns, and whether in pairs.
HEADS = [
    (32, 8, 128, 1.0, False),
    (9, 3, 64, 1.0, True),
    (4, 4, 80, 0.4, False),
    (8, 1, 256, 1, True),
]
# Some once, one several hundred times, one in between.
IDS = torch.cat((torch.arange(7), torch.full((260,), 3), torch.arange(20) % 7))


def choices(kind: type[tuning.Tuned], key: dict[str, int]) -> list[Any]:
    """What a launch may be given on this architecture."""
    if kind in TABLES:
        part = "_OPTIONS" if key["options"] else "_DOCUMENTS" if key["documents"] else ""
        table = getattr(configs, TABLES[kind] + part)[max(key["block_d"], 64)]
        return [kind.of(each) for each in table if each.kwargs["TMA"] == key["can_tma"]]
    if issubclass(kind, matmul.GluBlocks):
        limit = occupancy.shared_memory_limit(torch.device("cpu")) // 2
        found = map(kind.of, matmul._HALF_CONFIGS)
        return [b for b in found if (b.block_m + b.block_n) * b.block_k * b.num_stages <= limit]
    return [kind.rule(**key), *kind.candidates_for(key)]


def tensor(at: int, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Values `at` elements past an aligned address, in rows that lie so far apart."""
    rows = (torch.randn(*shape[:-1], shape[-1] + at) * 0.5).to(dtype)
    return torch.cat((rows.new_zeros(at), rows.flatten()))[at:].view(rows.shape)[..., : shape[-1]]


def leaves(*shapes: tuple[int, ...]) -> Callable[[int], list[Tensor]]:
    return lambda at: [tensor(at, *shape).requires_grad_() for shape in shapes]


def lists(*dtypes: torch.dtype) -> Callable[[int], list[Tensor]]:
    """For each of many sizes a tensor of each dtype, at all distances."""
    sizes = list(enumerate((*((37 * i * i + 1) % 1361 for i in range(40)), 0, 9001, 4096)))
    return lambda at: [tensor(at * (i % 9), size, dtype=d) for i, size in sizes for d in dtypes]


def adamw(*given: Tensor) -> tuple[Tensor, ...]:
    params, grads, means, squares, copies = (given[place::5] for place in range(5))
    torch._foreach_abs_(squares)
    adamw_step_(params, grads, means, squares, torch.tensor(3.0), lr=1e-2, copies=copies)
    return given


def accumulate_and_clip(*given: Tensor) -> list[Tensor]:
    mains, grads = given[::2], given[1::2]
    accumulate_(mains, grads, 0.5)
    norms = [clip_grad_norm_(grads, 0.25), clip_grad_norm_(mains, 0.25, float("inf"))]
    return [*given, *norms]


def cross_entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    target = torch.tensor([0, logits.shape[1] - 1, -100, 17])
    return vocab_parallel_cross_entropy(logits * 1, target, ignore_index=-100, z_loss=1e-2)


def _rope_cases(q: int, kv: int, dim: int, share: float, pairs: bool) -> dict[str, Any]:
    tables = rope_tables(dim, 160, partial_rotary_factor=share)
    name, rows, ids = f"{q} {kv} {dim} {pairs}", (q + 2 * kv) * dim, torch.arange(9) % 7

    def packed(qkv: Tensor) -> tuple[Tensor, ...]:
        return rope_qkv(qkv, *tables, q, kv, dim, ids, pairs)

    def normed(*given: Tensor) -> tuple[Tensor, ...]:
        return rope_normed(*given, *tables, position_ids=ids, interleaved=pairs)

    def multiplied(x: Tensor, weight: Tensor) -> Tensor:
        return matmul_rope(x, weight, None, *tables, 2, 1, dim, None, pairs)

    return {
        f"rope {name}": (packed, leaves((9, rows))),
        f"rope_normed {name}": (normed, leaves((9, q, dim), (9, kv, dim), (dim,), (dim,))),
        f"matmul_rope {name}": (multiplied, lambda at: [tensor(0, n, 128) for n in (133, 4 * dim)]),
    }


def _cases() -> dict[str, tuple[Callable[..., Any], Callable[[int], list[Tensor]]]]:
    """What is called, and what makes its tensors at a distance from an aligned address."""
    found: dict[str, Any] = {}
    # 192 takes the table of 256, padded.
    for dim, kind in [*product((64, 128, 256), KINDS), (192, "dense")]:
        lead = (160,) if "cu_seqlens" in KINDS[kind] else (1, 160)
        shapes = [(*lead, heads, dim) for heads in (2, 1, 1)]
        found[f"attention {dim} {kind}"] = partial(attention, **KINDS[kind]), leaves(*shapes)
    for hidden, rows in ((576, 70), (4096, 9), (5461, 5), (16384, 5), (16385, 2)):
        shapes = [(rows, hidden), (hidden,), (rows, hidden)]
        found[f"rms_norm {hidden}"] = lambda x, w, more: rms_norm(x, w, 1e-5, more), leaves(*shapes)
    for inter in (128, 1365, 14336):
        found[f"glu {inter}"] = glu, leaves((3, 2 * inter))
    for vocab in (1024, 16384, 50257):
        found[f"cross_entropy {vocab}"] = cross_entropy, leaves((4, vocab))
    for hidden in (100, 1365, 4096):
        embed = partial(vocab_parallel_embedding, IDS)
        found[f"embedding {hidden}"] = embed, leaves((7, hidden))
    for heads in HEADS:
        found |= _rope_cases(*heads)
    found["matmul_glu"] = matmul_glu, lambda at: [tensor(0, n, 512) for n in (133, 300)]
    found["adamw"] = adamw, lists(FP32, BF16, FP32, FP32, BF16)
    found["adamw bf16"] = adamw, lists(*[BF16] * 5)
    found["accumulate_and_clip"] = accumulate_and_clip, lists(FP32, BF16)
    found["pack"] = partial(pack_qkv, tp=2), lambda at: [tensor(at, n, 200) for n in (64, 32, 32)]
    return found


CASES = _cases()


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_every_configuration(monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> None:
    call, make = CASES[name]

    def results(seed: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        monkeypatch.setenv("EMULATOR_SEED", seed)
        monkeypatch.setenv("NANOTRON_FAST_BACKEND", "triton" if dtype is None else "torch")
        torch.manual_seed(0)
        given = make(at)
        if dtype is not None:
            given = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in given]
        return run(call, given)

    expected = results("0", FP32)
    counts, picked = {1}, []

    def pick(kind: type[tuning.Tuned], key: dict[str, int]) -> Any:
        found = choices(kind, key)
        counts.add(len(found))
        picked.append(found[place % len(found)])
        return picked[-1]

    place = 0
    while place < max(counts):
        picked.clear()
        with tuning.picking(pick):
            once, again = results("0"), results("5")
        assert picked
        for ours, same, reference in zip(once, again, expected, strict=True):
            assert torch.equal(ours, same), picked
            assert_close(ours, reference, factor=4)
        place += 1
