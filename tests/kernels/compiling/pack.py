"""Launches of the packer's Triton kernel to compile: one kernel serves every table."""

from __future__ import annotations

import torch

from nanotron_fast.kernels import pack

FILES = ("pack.kernels",)


def _qkv(tp: int) -> None:
    q, kv = torch.empty(4096, 512, dtype=torch.bfloat16), torch.empty(1024, 512).bfloat16()
    pack.pack_qkv(q, kv, kv, tp, dtype=torch.float32)


def _one_move() -> None:
    pack.shard(torch.empty(64, 64), 1, 2, rank=1)


CASES = [lambda: _qkv(8), _one_move]
