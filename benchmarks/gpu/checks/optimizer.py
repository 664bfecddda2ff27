"""The optimizer's step on lists of tensors.

Each works on copies, which it gives back. The copies stay where they are from call to call, as
parameters do: a graph that was captured must find them there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.gpu.context import Context
from benchmarks.gpu.harness import Builder, Check, check, precompile

__all__ = ["BUILDERS", "check", "precompile"]

# Far larger than in training: every term changes what it is part of by some percent in each step.
_STEP = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 0.3, "weight_decay": 1.0}
_NUM_STEPS = 3
_NEXT_GRADIENT = -0.5  # what the gradients of a step are multiplied by for the next


def _shapes(context: Context) -> list[tuple[int, ...]]:
    if context.dry:
        return [(7, 30), (33,), (2, 3, 5)]
    return [(4096, 4096), (14336, 4096), (4096,), (1000, 333), (4096, 1024)]


def _list(context: Context, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, device=context.device).to(dtype) for shape in _shapes(context)]


def _adamw(variant: str, context: Context) -> Check:
    from nanotron_fast.kernels.optimizer.adamw import adamw_step_, adamw_step_reference_

    is_low = variant == "low-precision state"
    bf16, state = torch.bfloat16, torch.bfloat16 if is_low else torch.float32
    count = len(_shapes(context))
    params, grads, first = (_list(context, dtype) for dtype in (state, bf16, state))
    second = [t.square() for t in _list(context, state)]

    def split(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        return [list(tensors[i * count : (i + 1) * count]) for i in range(4)]

    static = [t.clone() for t in (*params, *grads, *first, *second)]
    static_copies = [] if is_low else [torch.empty_like(t, dtype=bf16) for t in params]
    static_step = torch.zeros((), device=context.device)

    def ours(*tensors: Tensor) -> list[Tensor]:
        torch._foreach_copy_(static, tensors)
        static_step.fill_(4.0)
        params, grads, first, second = split(static)
        for _ in range(_NUM_STEPS):
            adamw_step_(params, grads, first, second, static_step, **_STEP, copies=static_copies)
            torch._foreach_mul_(grads, _NEXT_GRADIENT)
        return [*params, *first, *second, *static_copies]

    def reference(*tensors: Tensor) -> list[Tensor]:
        params, grads, first, second = ([t.clone() for t in part] for part in split(tensors))
        step = torch.full((), 4.0, device=context.device)
        for _ in range(_NUM_STEPS):
            adamw_step_reference_(params, grads, first, second, [step], **_STEP)
            grads = [grad * _NEXT_GRADIENT for grad in grads]
        return [*params, *first, *second, *([] if is_low else [t.clone() for t in params])]

    # A low-precision state is rounded in each of the steps, a copy of fp32 masters once.
    tolerances = {bf16: 2e-2} if is_low else {}
    return Check([*params, *grads, *first, *second], ours, reference, tolerances=tolerances)


def _accumulate(variant: str, context: Context) -> Check:
    from nanotron_fast.kernels.optimizer import accumulate_

    mains, grads = _list(context, torch.float32), _list(context, torch.bfloat16)
    if variant == "mixed":
        grads = [t.float() if i % 2 else t for i, t in enumerate(grads)]

    static = [t.clone() for t in (*mains, *grads)]

    def ours(*tensors: Tensor) -> list[Tensor]:
        torch._foreach_copy_(static, tensors)
        accumulate_(static[: len(mains)], static[len(mains) :], 0.25)
        return static[: len(mains)]

    def reference(*tensors: Tensor) -> list[Tensor]:
        pairs = zip(tensors[: len(mains)], tensors[len(mains) :], strict=True)
        return [main + 0.25 * grad for main, grad in pairs]

    return Check([*mains, *grads], ours, reference)


def _clip(variant: str, context: Context) -> Check:
    from nanotron_fast.kernels.optimizer.grad_norm import clip_grad_norm_

    grads = _list(context, torch.bfloat16)
    bound = 1e9 if variant == "within its bound" else 0.5
    kind = float("inf") if variant == "infinity" else 2.0

    static = [t.clone() for t in grads]

    def ours(*tensors: Tensor) -> list[Tensor]:
        torch._foreach_copy_(static, tensors)
        return [clip_grad_norm_(static, bound, kind), *static]

    def reference(*tensors: Tensor) -> list[Tensor]:
        norm = torch.linalg.vector_norm(torch.cat([t.flatten() for t in tensors]), kind)
        factor = (bound / (norm + 1e-6)).clamp(max=1.0)
        return [norm, *(t * factor for t in tensors)]

    return Check(grads, ours, reference)


BUILDERS: dict[str, Builder] = {"adamw": _adamw, "accumulate": _accumulate, "clip": _clip}
