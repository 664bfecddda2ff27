"""Launches of matmul_glu and matmul_rope to compile."""

from __future__ import annotations

from functools import partial

import torch

from nanotron_fast.kernels.matmul import matmul_glu, matmul_rope
from nanotron_fast.kernels.rope import rope_tables

FILES = ("matmul.kernels",)


def _glu(
    dtype: torch.dtype, activation: str = "silu", saves: bool = False, hidden: int = 128
) -> None:
    x, weight = torch.empty(256, hidden, dtype=dtype), torch.empty(256, hidden, dtype=dtype)
    matmul_glu(x, weight, activation, save_gate_up=saves)


def _rope(
    dtype: torch.dtype,
    head_dim: int = 128,
    share: float = 1.0,
    interleaved: bool = False,
    has_more: bool = True,
    hidden: int = 128,
) -> None:
    """`has_more`: a bias and positions."""
    x, weight = (
        torch.empty(256, hidden, dtype=dtype),
        torch.empty(4 * head_dim, hidden, dtype=dtype),
    )
    bias = torch.empty(4 * head_dim, dtype=dtype) if has_more else None
    position_ids = torch.zeros(256, dtype=torch.int64) if has_more else None
    cos, sin = rope_tables(head_dim, 256, partial_rotary_factor=share)
    matmul_rope(x, weight, bias, cos, sin, 2, 1, head_dim, position_ids, interleaved)


def _wide() -> None:
    """A weight of 2^31 elements, none of which is ever touched."""
    x, weight = (torch.empty(rows, 1 << 13, dtype=torch.bfloat16) for rows in (256, 1 << 18))
    matmul_glu(x, weight)


CASES = [
    _wide,
    partial(_glu, torch.bfloat16),
    partial(_glu, torch.bfloat16, saves=True),
    partial(_glu, torch.bfloat16, "gelu"),
    partial(_glu, torch.bfloat16, "gelu_tanh", hidden=100),
    partial(_glu, torch.float16, saves=True),
    partial(_glu, torch.float32, saves=True),
    partial(_rope, torch.bfloat16),
    partial(_rope, torch.bfloat16, has_more=False),
    partial(_rope, torch.bfloat16, interleaved=True),
    partial(_rope, torch.bfloat16, 80, 0.4),
    partial(_rope, torch.bfloat16, 64, hidden=100),
    partial(_rope, torch.float16, 96),
    partial(_rope, torch.float32, interleaved=True),
]
