"""Launches of cross_entropy to compile."""

from __future__ import annotations

from functools import partial

import torch

from nanotron_fast.kernels.cross_entropy import vocab_parallel_cross_entropy
from nanotron_fast.kernels.cross_entropy.operators import combine

FILES = ("cross_entropy.kernels",)


def _step(dtype: torch.dtype, vocab: int, **options) -> None:
    leaf = torch.empty(16, vocab, dtype=dtype, requires_grad=True)
    target = torch.zeros(16, dtype=torch.int64)
    out = vocab_parallel_cross_entropy(leaf * 1, target, **options)
    (out[0] if isinstance(out, tuple) else out).sum().backward()


def _combine_of_eight() -> None:
    target = torch.zeros(4096, dtype=torch.int64)
    combine(torch.empty(8, 3, 4096), target, 16384, None, 0.0, False)


Z_LOSS = {"z_loss": 1e-4, "ignore_index": -100}
CASES = [
    partial(_step, torch.bfloat16, 131072),
    partial(_step, torch.bfloat16, 131072, **Z_LOSS),
    partial(_step, torch.bfloat16, 131072, z_loss_mode="correct", **Z_LOSS),
    partial(_step, torch.bfloat16, 1024),
    # No row starts at a multiple of 16 bytes.
    partial(_step, torch.bfloat16, 50257),
    partial(_step, torch.float16, 131072, ignore_index=-100),
    partial(_step, torch.float32, 131072, ignore_index=-100),
    _combine_of_eight,
]
