"""Launches of optimizer, grad_norm and adamw to compile."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import torch

from nanotron_fast.kernels.optimizer import accumulate_, adamw_step_, clip_grad_norm_

FILES = ("optimizer.accumulate", "optimizer.adamw", "optimizer.grad_norm")

_NUM_ELEMENTS = 65536
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32


def _tensor(dtype: torch.dtype, is_aligned: bool) -> torch.Tensor:
    return torch.zeros(_NUM_ELEMENTS if is_aligned else _NUM_ELEMENTS - 1, dtype=dtype)


def _accumulate(dtype: torch.dtype, is_aligned: bool) -> None:
    accumulate_([_tensor(_FP32, is_aligned)], [_tensor(dtype, is_aligned)], 0.5)


def _clip(dtype: torch.dtype, is_aligned: bool, norm_type: float) -> None:
    clip_grad_norm_([_tensor(dtype, is_aligned)], 1.0, norm_type)


def _adamw(
    param: torch.dtype,
    grad: torch.dtype,
    state: torch.dtype,
    copy: torch.dtype | None,
    is_aligned: bool = True,
    has_tensors: bool = False,
) -> None:
    step = torch.zeros(())
    adamw_step_(
        *([_tensor(dtype, is_aligned)] * 2 for dtype in (param, grad, state, state)),
        [step, torch.zeros(())] if has_tensors else step,
        lr=torch.tensor(1e-3) if has_tensors else 1e-3,
        copies=None if copy is None else [_tensor(copy, is_aligned)] * 2,
        grad_scale=torch.ones(()) if has_tensors else None,
        found_inf=torch.zeros(()) if has_tensors else None,
        maximize=has_tensors,
    )


CASES = [
    *(partial(_accumulate, *case) for case in product((_BF16, _FP16, _FP32), (True, False))),
    *(partial(_clip, *case) for case in product((_BF16, _FP32), (True, False), (2.0, math.inf))),
    *(partial(_clip, _FP32, True, norm_type) for norm_type in (1.0, 3.0)),
    partial(_adamw, _FP32, _BF16, _FP32, _BF16),
    partial(_adamw, _FP32, _BF16, _FP32, _BF16, is_aligned=False),
    partial(_adamw, _FP32, _BF16, _FP32, _BF16, has_tensors=True),
    partial(_adamw, _FP32, _FP32, _FP32, _BF16),
    partial(_adamw, _FP32, _FP32, _FP32, None),
    partial(_adamw, _BF16, _BF16, _FP32, None),
    partial(_adamw, _BF16, _BF16, _BF16, None),
    partial(_adamw, _FP16, _FP16, _FP16, None, has_tensors=True),
]
