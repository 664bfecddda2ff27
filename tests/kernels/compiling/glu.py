"""Launches of the gated linear unit to compile."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch

from nanotron_fast.kernels.glu import glu, glu_backward

FILES = ("glu",)


def _step(dtype: torch.dtype, inter: int, activation: str) -> None:
    gate_up = torch.empty(16, 2 * inter, dtype=dtype, requires_grad=True)
    glu(gate_up, activation).sum().backward()


def _recompute(dtype: torch.dtype, inter: int, activation: str) -> None:
    gate_up = torch.empty(16, 2 * inter, dtype=dtype)
    glu_backward(torch.empty(16, inter, dtype=dtype), gate_up, activation, with_output=True)


CASES = [
    *(
        partial(_step, *case)
        for case in product(
            (torch.bfloat16, torch.float32), (128, 14336), ("silu", "gelu", "gelu_tanh")
        )
    ),
    partial(_step, torch.float16, 14336, "silu"),
    # An odd width: no access of 16 bytes.
    partial(_step, torch.bfloat16, 1365, "silu"),
    *(partial(_step, torch.bfloat16, inter, "silu") for inter in (2730, 1364, 1368)),
    *(partial(_recompute, torch.bfloat16, 14336, name) for name in ("silu", "gelu", "gelu_tanh")),
]
