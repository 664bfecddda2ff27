"""Launches of attention to compile."""

from __future__ import annotations

from functools import partial

import torch

from nanotron_fast.kernels.attention import attention

FILES = ("attention_forward", "attention_dkv", "attention_dq")
_BF16, _FP32 = torch.bfloat16, torch.float32


def _step(dtype: torch.dtype, head_dim: int, documents: bool, **options) -> None:
    shape = (2048,) if documents else (2, 1024)
    q = torch.zeros(*shape, 8, head_dim, dtype=dtype, requires_grad=True)
    k, v = (torch.zeros(*shape, 2, head_dim, dtype=dtype, requires_grad=True) for _ in range(2))
    if documents:
        options["cu_seqlens"] = torch.tensor([0, 1000, 2048], dtype=torch.int32)
    attention(q, k, v, **options).sum().backward()


# Each compiles every configuration of three kernels: few, chosen for what they add.
CASES = [
    partial(_step, _BF16, 128, False),
    partial(_step, _BF16, 64, True),
    partial(_step, _BF16, 80, False, window=512),
    partial(_step, _BF16, 256, False, softcap=50.0),
    partial(_step, _FP32, 128, False),
]
