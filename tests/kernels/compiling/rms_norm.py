"""Launches of rms_norm to compile."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch

from nanotron_fast.kernels.rms_norm import rms_norm

FILES = ("rms_norm.kernels", "rms_norm.part_kernels")


def _step(dtype: torch.dtype, hidden: int, has_residual: bool) -> None:
    x = torch.empty(16, hidden, dtype=dtype, requires_grad=True)
    weight = torch.empty(hidden, dtype=dtype, requires_grad=True)
    residual = torch.empty_like(x, requires_grad=True) if has_residual else None
    out = rms_norm(x, weight, residual=residual)
    sum(out if has_residual else [out]).sum().backward()


CASES = [
    *(partial(_step, torch.bfloat16, hidden, True) for hidden in (5461, 9001, 9002)),
    *(
        partial(_step, *case)
        for case in product(
            (torch.bfloat16, torch.float16, torch.float32),
            (576, 577, 580, 584, 16385, 65536, 4096, 8192, 16384),
            (False, True),
        )
    ),
]
