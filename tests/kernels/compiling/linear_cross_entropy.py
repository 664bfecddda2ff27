"""Launches of linear_cross_entropy to compile: those of cross_entropy, on its buffer of logits."""

from __future__ import annotations

from functools import partial

import torch

from nanotron_fast.kernels.linear_cross_entropy import linear_cross_entropy

FILES = ()


def _step(dtype: torch.dtype, vocab: int, **options) -> None:
    hidden = torch.empty(16, 16, dtype=dtype, requires_grad=True)
    weight = torch.empty(vocab, 16, dtype=dtype, requires_grad=True)
    target = torch.zeros(16, dtype=torch.int64)
    out = linear_cross_entropy(hidden, weight, target, **options)
    (out[0] if isinstance(out, tuple) else out).sum().backward()


CASES = [
    partial(_step, torch.bfloat16, 32000, ignore_index=-100),
    # Rows that are padded to a multiple of 128 bytes.
    partial(_step, torch.bfloat16, 50257, reduction="none"),
    partial(_step, torch.float32, 32000, z_loss=1e-4),
]
