"""Launches of embedding to compile."""

from __future__ import annotations

from functools import partial

import torch

from nanotron_fast.kernels.embedding import vocab_parallel_embedding

FILES = ("embedding.kernels",)


def _step(dtype: torch.dtype, hidden: int, ids: torch.dtype = torch.int64) -> None:
    weight = torch.empty(512, hidden, dtype=dtype, requires_grad=True)
    vocab_parallel_embedding(torch.zeros(2, 512, dtype=ids), weight).sum().backward()


def _step_with_main_grad(dtype: torch.dtype, hidden: int) -> None:
    weight = torch.empty(512, hidden, dtype=dtype, requires_grad=True)
    weight.main_grad = torch.empty(512, hidden)
    vocab_parallel_embedding(torch.zeros(2, 512, dtype=torch.int64), weight).sum().backward()


CASES = [
    partial(_step, torch.bfloat16, 4098),
    partial(_step, torch.bfloat16, 576),
    partial(_step, torch.bfloat16, 4096),
    partial(_step, torch.bfloat16, 4096, torch.int32),
    partial(_step, torch.bfloat16, 100),
    partial(_step, torch.float16, 4096),
    partial(_step, torch.float32, 8192),
    partial(_step_with_main_grad, torch.bfloat16, 4096),
]
