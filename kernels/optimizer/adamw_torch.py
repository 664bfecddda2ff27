"""AdamW in plain torch: the reference that the kernel is held to, and what CPU tensors take.

The formulas are in `adamw`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def adamw_step_reference_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    copies: Sequence[Tensor] = (),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    maximize: bool = False,
) -> None:
    """The same in plain torch, at least in fp32.

    A parameter at a time: what it needs beside its arguments is a few times the largest parameter.
    """
    beta1, beta2 = betas
    is_applied = None if found_inf is None else found_inf.reshape(()) == 0
    for step in steps:
        step.add_(1 if is_applied is None else is_applied)
    for place, (param, grad, exp_avg, exp_avg_sq) in enumerate(
        zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)
    ):
        step = steps[place if len(steps) > 1 else 0].reshape(()).double()
        wide = torch.promote_types(param.dtype, torch.float32)
        g = -grad.to(wide) if maximize else grad.to(wide)
        if grad_scale is not None:
            g = g / grad_scale.reshape(())
        p = param.to(wide)
        p = p - lr * weight_decay * p
        m = exp_avg.to(wide).lerp(g, 1 - beta1)
        v = exp_avg_sq.to(wide) * beta2 + (1 - beta2) * g.square()
        denominator = v.sqrt() / (1 - beta2**step).sqrt() + eps
        p = p - lr / (1 - beta1**step) * (m / denominator)
        outputs = [(param, p), (exp_avg, m), (exp_avg_sq, v)]
        if copies:
            outputs.append((copies[place], p))
        for output, value in outputs:
            output.copy_(value if is_applied is None else torch.where(is_applied, value, output))


def adamw_step_cpu(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    copies: list[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    betas: tuple[float, float],
    **options: Any,
) -> None:
    """The same by torch's fused step, in one call for all that it takes as they are.

    It wants one dtype for a parameter and all that belongs to it, and leaves gradients divided by
    grad_scale. What it does not take as it is passes through temporary tensors, one parameter at a
    time.
    """
    options |= {"beta1": betas[0], "beta2": betas[1], "amsgrad": False}
    is_applied = None
    if found_inf is not None:
        is_applied = found_inf.reshape(()) == 0
        options["found_inf"] = (~is_applied).float()  # it looks for 1 alone
    for step in steps:
        step.add_(1 if is_applied is None else is_applied)
    steps = steps if len(steps) > 1 else steps * len(params)
    as_they_are: list[tuple[Tensor, ...]] = []
    for place, row in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)):
        *tensors, step = row
        wide = torch.promote_types(row[0].dtype, torch.float32)
        # A copy of another dtype is made from the parameter before the parameter is rounded.
        same = [*tensors, *copies[place : place + 1]] if row[0].dtype != wide else tensors
        is_one = len({tensor.dtype for tensor in same}) == 1
        if is_one and grad_scale is None:
            as_they_are.append(row)
            continue
        param, grad, *states = (tensor.to(wide) for tensor in tensors)
        if grad_scale is not None:
            grad = grad / grad_scale.reshape(())
        _fused(([param], [grad], *([state] for state in states), [step]), options)
        results = [(row[0], param), *zip(row[2:4], states, strict=True)]
        results += [(copy, param) for copy in copies[place : place + 1]]
        for tensor, result in results:
            if tensor is not result:
                tensor.copy_(_where(is_applied, result, tensor))
    if as_they_are:
        _fused(tuple(map(list, zip(*as_they_are, strict=True))), options)
    written = {id(row[0]) for row in as_they_are}
    for copy, param in zip(copies, params if copies else (), strict=True):
        if id(param) in written:
            copy.copy_(_where(is_applied, param, copy))


def _where(is_applied: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if is_applied is None else torch.where(is_applied, new, old)


def _fused(lists: tuple[list[Tensor], ...], options: dict[str, Any]) -> None:
    *tensors, steps = lists
    torch._fused_adamw_(*tensors, [], steps, **options)
    # torch's step does not tell autograd, which may have saved what it has written.
    params, _, *states = tensors
    changed = (tensor for each in (params, *states) for tensor in each)
    torch.autograd.graph.increment_version([t for t in changed if not t.is_inference()])
