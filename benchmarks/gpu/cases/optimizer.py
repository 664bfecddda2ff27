"""The optimizer's step: lists of tensors, in place, without a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.gpu.cases.case import Case, Setting

_OPTIONS = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-8}
_BETAS = (0.9, 0.95)


def _shapes(setting: Setting) -> list[tuple[int, ...]]:
    """A layer of Llama 3 8B's, twice."""
    layer = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (4096,), (4096,)]
    return setting.pick(2 * layer, [(5, 12), (7,)], [(512, 512), (512,)])


def _list(setting: Setting, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, device=setting.device).to(dtype) for shape in _shapes(setting)]


def adamw_cases(setting: Setting) -> Iterator[Case]:
    from nanotron_fast.kernels.optimizer.adamw import adamw_step_

    count = len(_shapes(setting))
    fp32, low = torch.float32, setting.dtype

    def tensors() -> list[Tensor]:
        params, first, second = (_list(setting, fp32) for _ in range(3))
        copies, grads = (_list(setting, low) for _ in range(2))
        steps = [torch.full((), 4.0, device=setting.device) for _ in params]
        return [*params, *first, *(t.abs() for t in second), *steps, *copies, *grads]

    def parts(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        return [list(tensors[i * count : (i + 1) * count]) for i in range(6)]

    def by_torch(*tensors: Tensor) -> list[Tensor]:
        params, first, second, steps, copies, grads = parts(tensors)
        beta1, beta2 = _BETAS
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            params, [g.float() for g in grads], first, second, [], steps,
            beta1=beta1, beta2=beta2, amsgrad=False, maximize=False, **_OPTIONS,
        )  # fmt: skip
        torch._foreach_copy_(copies, params)
        return [*params, *first, *second, *copies]

    def ours(*tensors: Tensor) -> list[Tensor]:
        params, first, second, steps, copies, grads = parts(tensors)
        adamw_step_(params, grads, first, second, steps, betas=_BETAS, copies=copies, **_OPTIONS)
        return [*params, *first, *second, *copies]

    num_elements = sum(map(math.prod, _shapes(setting)))
    yield Case(
        "adamw",
        f"{num_elements / 1e6:.3g} M, fp32 masters, {low} gradients and copies",
        tensors,
        {"torch": by_torch, "ours": ours},
        bytes_forward=(24 + 2 * low.itemsize) * num_elements,
    )


def accumulate_cases(setting: Setting) -> Iterator[Case]:
    from nanotron_fast.kernels.optimizer import accumulate_

    count, low = len(_shapes(setting)), setting.dtype

    def tensors() -> list[Tensor]:
        return [*_list(setting, torch.float32), *_list(setting, low)]

    def by_torch(*tensors: Tensor) -> list[Tensor]:
        torch._foreach_add_(list(tensors[:count]), list(tensors[count:]), alpha=0.5)
        return list(tensors[:count])

    def ours(*tensors: Tensor) -> list[Tensor]:
        accumulate_(tensors[:count], tensors[count:], 0.5)
        return list(tensors[:count])

    num_elements = sum(map(math.prod, _shapes(setting)))
    yield Case(
        "accumulate",
        f"{num_elements / 1e6:.3g} M, {low} into fp32",
        tensors,
        {"torch": by_torch, "ours": ours},
        bytes_forward=(8 + low.itemsize) * num_elements,
    )


def clip_cases(setting: Setting) -> Iterator[Case]:
    from nanotron_fast.kernels.optimizer.grad_norm import clip_grad_norm_

    def by_torch(*grads: Tensor) -> list[Tensor]:
        norms = torch._foreach_norm(grads, 2.0, dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        torch._foreach_mul_(grads, (0.5 / (norm + 1e-6)).clamp(max=1.0))
        return [norm, *grads]

    def ours(*grads: Tensor) -> list[Tensor]:
        return [clip_grad_norm_(grads, 0.5), *grads]

    num_elements = sum(map(math.prod, _shapes(setting)))
    yield Case(
        "clip",
        f"{num_elements / 1e6:.3g} M, {setting.dtype}",
        lambda: _list(setting, setting.dtype),
        {"torch": by_torch, "ours": ours},
        bytes_forward=3 * setting.dtype.itemsize * num_elements,
    )
