"""Launches of attention to compile.

Every configuration of the tables in attention_configs.py, at the head_dim that each is for: dense,
with documents, and with options; a padded head_dim; fp32.
"""

from __future__ import annotations

from functools import partial

import torch

from nanotron_fast.kernels.attention import attention

FILES = ("attention.kernels.forward", "attention.kernels.dkv", "attention.kernels.dq")


def _step(
    dtype: torch.dtype,
    head_dim: int,
    *,
    has_documents: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    lead = (4096,) if has_documents else (1, 4096)
    q, k, v = (
        torch.empty(*lead, heads, head_dim, dtype=dtype, requires_grad=True) for heads in (8, 2, 2)
    )
    cu_seqlens = torch.zeros(17, dtype=torch.int32) if has_documents else None
    out = attention(q, k, v, cu_seqlens=cu_seqlens, window=window, softcap=softcap)
    out.sum().backward()


CASES = [
    partial(_step, torch.bfloat16, 128),
    partial(_step, torch.bfloat16, 128, has_documents=True),
    partial(_step, torch.bfloat16, 128, has_documents=True, window=1024, softcap=30.0),
    partial(_step, torch.bfloat16, 64),
    partial(_step, torch.bfloat16, 64, has_documents=True, window=1024, softcap=30.0),
    partial(_step, torch.bfloat16, 256, has_documents=True),
    partial(_step, torch.bfloat16, 256, softcap=50.0),
    partial(_step, torch.bfloat16, 96),
    partial(_step, torch.float32, 128),
    partial(_step, torch.float32, 64, has_documents=True, window=1024, softcap=30.0),
]
