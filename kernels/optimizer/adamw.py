"""AdamW on lists of tensors, with the low-precision copy of the parameters in the same pass.

    t += 1
    p -= lr * weight_decay * p
    m += (1 - beta1) (g - m)              v = beta2 v + (1 - beta2) g^2
    p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    copy = p

All of it in fp32 and rounded once into each result; 1 - beta^t in fp64, once a step counter. What
torch.optim.AdamW(fused=True) computes (Loshchilov and Hutter, 2019).
Bytes an element, with masters and state in fp32 and bf16 gradients (fp32 ones): 12 + 2 (4) read,
12 written, and 2 for the copy: 28 (30). A small launch counts the steps, then follows one for each
combination of dtypes; nothing waits for the device. `multi_tensor` explains the tables of a launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanotron_fast.kernels.optimizer import shards
from nanotron_fast.kernels.optimizer.adamw_torch import adamw_step_cpu, adamw_step_reference_
from nanotron_fast.kernels.optimizer.multi_tensor import (
    TRITON_DTYPES,
    Bundle,
    addresses_of,
    bundles_of,
    check_lists,
    find_segment,
    pointer,
    takes_reference,
)
from nanotron_fast.kernels.optimizer.plan import plan_of, takes_plan
from nanotron_fast.kernels.runtime import capture
from nanotron_fast.kernels.runtime.launch import on_grid
from nanotron_fast.kernels.runtime.operators import on_device, operator, tell_autograd
from nanotron_fast.kernels.runtime.sizes import ceil_div
from nanotron_fast.kernels.runtime.tuning import Tuned

_STEPS_BLOCK = 256


@dataclass(frozen=True)
class _Blocks(Tuned, operation="adamw"):
    """`block` elements of a tensor to a program."""

    block: int
    num_warps: int

    @classmethod
    def rule(cls, param_itemsize: int, grad_itemsize: int) -> _Blocks:
        return cls(1024, 4)

    def candidates(self) -> list[_Blocks]:
        return [_Blocks(*each) for each in ((512, 4), (1024, 8), (2048, 4), (2048, 8))]


def _blocks(params: Sequence[Tensor], grads: Sequence[Tensor]) -> _Blocks:
    """By the first of them, for all."""
    sizes = params[0].element_size(), grads[0].element_size()
    return _Blocks.chosen(param_itemsize=sizes[0], grad_itemsize=sizes[1])


@triton.jit(do_not_specialize=["num_steps"])
def _count_steps_kernel(
    step_addresses_ptr,
    found_inf_ptr,
    corrections_ptr,
    num_steps,
    log2_beta1,
    log2_beta2,
    HAS_FOUND_INF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = places < num_steps
    addresses = tl.load(step_addresses_ptr + places, mask=mask, other=0)
    step_ptrs = addresses.to(tl.pointer_type(tl.float32))
    steps = tl.load(step_ptrs, mask=mask, other=0.0) + 1.0
    if HAS_FOUND_INF:
        steps -= tl.where(tl.load(found_inf_ptr) == 0.0, 0.0, 1.0)
    tl.store(step_ptrs, steps, mask=mask)
    # In fp32 little would be left of 1 - 0.999^t in the first steps. The logarithm may be fp32: its
    # relative error is that of the difference.
    steps = steps.to(tl.float64)
    correction1 = (1.0 / (1.0 - tl.exp2(steps * log2_beta1))).to(tl.float32)
    correction2 = (1.0 / tl.sqrt(1.0 - tl.exp2(steps * log2_beta2))).to(tl.float32)
    tl.store(corrections_ptr + 2 * places, correction1, mask=mask)
    tl.store(corrections_ptr + 2 * places + 1, correction2, mask=mask)


@triton.jit(do_not_specialize=["num_tensors"])
def _adamw_kernel(
    segment_tensors_ptr,
    extents_ptr,
    addresses_ptr,
    num_tensors,
    corrections_ptr,
    lr_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    lr,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    weight_decay,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    COPY: tl.constexpr,
    HAS_ONE_STEP: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if found_inf_ptr is not None:  # noqa: SIM102 (`and` would load where there is nothing)
        if tl.load(found_inf_ptr) != 0.0:
            return
    tensor, start, numel = find_segment(
        segment_tensors_ptr, extents_ptr, num_tensors, BLOCK, VECTOR
    )
    param_ptr = pointer(addresses_ptr, num_tensors, tensor, 0, PARAM, VECTOR)
    grad_ptr = pointer(addresses_ptr, num_tensors, tensor, 1, GRAD, VECTOR)
    exp_avg_ptr = pointer(addresses_ptr, num_tensors, tensor, 2, EXP_AVG, VECTOR)
    exp_avg_sq_ptr = pointer(addresses_ptr, num_tensors, tensor, 3, EXP_AVG_SQ, VECTOR)
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < numel
    g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(param_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(exp_avg_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0.0).to(tl.float32)

    place = 0 if HAS_ONE_STEP else tl.load(extents_ptr + 2 * num_tensors + tensor)
    correction1 = tl.load(corrections_ptr + 2 * place)
    correction2 = tl.load(corrections_ptr + 2 * place + 1)
    if lr_ptr is not None:
        lr = tl.load(lr_ptr)
    if grad_scale_ptr is not None:
        g *= 1.0 / tl.load(grad_scale_ptr)
    if MAXIMIZE:
        g = -g
    p -= (lr * weight_decay) * p
    m += one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * (g * g)
    p -= (lr * correction1) * (m / (tl.sqrt(v) * correction2 + eps))

    tl.store(param_ptr + offsets, p.to(PARAM), mask=mask)
    tl.store(exp_avg_ptr + offsets, m.to(EXP_AVG), mask=mask)
    tl.store(exp_avg_sq_ptr + offsets, v.to(EXP_AVG_SQ), mask=mask)
    if COPY is not None:
        copy_ptr = pointer(addresses_ptr, num_tensors, tensor, 4, COPY, VECTOR)
        tl.store(copy_ptr + offsets, p.to(COPY), mask=mask)


class _Scalars(NamedTuple):
    """Numbers that kernels read where they are: fp32, one each, or None."""

    lr: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None


class _Numbers(NamedTuple):
    """What kernels are given as it is; lr counts where it is not on the device."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool


@operator(
    "nanotron_fast::adamw_step_",
    mutates_args=("params", "exp_avgs", "exp_avg_sqs", "steps", "copies"),
)
def _adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """`copies` is empty where there are none; `steps` has one tensor for all or one for each."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, *([copies] if copies else []))
    blocks = _blocks(params, grads)
    _launch(
        bundles_of(lists, blocks.block),
        blocks,
        addresses_of(steps),
        _Scalars(lr_tensor, grad_scale, found_inf),
        _Numbers(lr, beta1, beta2, eps, weight_decay, maximize),
    )


def _launch(
    bundles: Sequence[Bundle],
    blocks: _Blocks,
    step_addresses: Tensor,
    scalars: _Scalars,
    numbers: _Numbers,
) -> None:
    lr, beta1, beta2, eps, weight_decay, maximize = numbers
    num_steps = step_addresses.shape[0]
    corrections = step_addresses.new_empty((num_steps, 2), dtype=torch.float32)
    on_grid(_count_steps_kernel, (ceil_div(num_steps, _STEPS_BLOCK),))(
        step_addresses,
        scalars.found_inf,
        corrections,
        num_steps,
        math.log2(beta1) if beta1 else -math.inf,
        math.log2(beta2) if beta2 else -math.inf,
        HAS_FOUND_INF=scalars.found_inf is not None,
        BLOCK=_STEPS_BLOCK,
        num_warps=4,
    )
    for bundle in bundles:
        param, grad, exp_avg, exp_avg_sq, *copy = [TRITON_DTYPES[each] for each in bundle.dtypes]
        on_grid(_adamw_kernel, (bundle.num_segments,))(
            *bundle.tables,
            corrections,
            *scalars,
            *(lr, 1 - beta1, beta2, 1 - beta2, eps, weight_decay),
            PARAM=param,
            GRAD=grad,
            EXP_AVG=exp_avg,
            EXP_AVG_SQ=exp_avg_sq,
            COPY=copy[0] if copy else None,
            HAS_ONE_STEP=num_steps == 1,
            MAXIMIZE=maximize,
            VECTOR=bundle.vector,
            BLOCK=blocks.block,
            num_warps=blocks.num_warps,
        )


def _scalar(name: str, value: Tensor | None, device: torch.device) -> Tensor | None:
    """One number, on the device and in fp32."""
    if value is None:
        return None
    if value.numel() != 1:
        raise ValueError(f"adamw_step_: {name} {tuple(value.shape)} is not one number")
    value = shards.whole(value)
    if value.device != device:
        capture.refuse_if_capturing(device, f"a step of AdamW whose {name} is on {value.device}")
    return value.to(device=device, dtype=torch.float32, non_blocking=True)


def _check(lists: dict[str, list[Tensor]], steps: list[Tensor]) -> None:
    check_lists("adamw_step_", "params", **lists)
    params = lists["params"]
    if not params:
        return
    if len(steps) not in (1, len(params)):
        raise ValueError(f"adamw_step_: {len(steps)} steps for {len(params)} params")
    for place, step in enumerate(steps):
        if step.dtype != torch.float32 or step.numel() != 1 or step.device != params[0].device:
            raise ValueError(
                f"adamw_step_: steps[{place}] {tuple(step.shape)} {step.dtype} on {step.device}: "
                f"one fp32 number on {params[0].device} is needed"
            )
    for label in ("exp_avgs", "exp_avg_sqs"):
        for place, (state, param) in enumerate(zip(lists[label], params, strict=True)):
            if state.dtype not in (torch.float32, param.dtype):
                raise ValueError(
                    f"adamw_step_: {label}[{place}] is {state.dtype} "
                    f"where params[{place}] is {param.dtype}"
                )


@torch.no_grad()
def adamw_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Tensor | Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    copies: Sequence[Tensor] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    maximize: bool = False,
) -> None:
    """One step of AdamW, in place: torch.optim.AdamW(fused=True) on lists.

    All tensors are contiguous and on one device; lists are as long as `params`, and their tensors
    have its shapes. Dtypes are bf16, fp16 or fp32 in any mixture. DTensors are updated where they
    lie: all that belongs to a parameter has its mesh and placements.

    Args:
        params: fp32 masters, or low-precision parameters themselves.
        grads: only read: unlike torch, gradients are not left divided by grad_scale.
        exp_avgs, exp_avg_sqs: fp32, or the parameter's dtype.
        steps: fp32, one number each: a tensor for each parameter, none of them twice, or one for
            all. Counted up before the step; zero before the first.
        lr: a tensor is read on the device.
        betas, eps, weight_decay: as torch has them; betas are below 1.
        copies: receive the new parameters, cast; the bf16 weights that the model computes with.
        grad_scale: gradients are divided by it. To clip without a pass of its own, give
            ((norm + 1e-6) / max_norm).clamp(min=1), where norm may be torch's, a DTensor.
        found_inf: where it is not zero, nothing changes, the steps included.
        maximize: step along the gradient.

    Raises:
        ValueError: lists do not fit, or a tensor is not contiguous; named by its place. So is a
            DTensor that lies in another way, or is yet to be summed.
    """
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adamw_step_: betas {betas}: each is from 0 to below 1")
    steps = [steps] if isinstance(steps, Tensor) else list(steps)
    lists = {
        "params": list(params),
        "grads": list(grads),
        "exp_avgs": list(exp_avgs),
        "exp_avg_sqs": list(exp_avg_sqs),
    }
    if copies:
        lists["copies"] = list(copies)
    written = [label for label in lists if label != "grads"]
    lists = shards.local("adamw_step_", lists, written=written)
    params, grads, exp_avgs, exp_avg_sqs, *rest = lists.values()
    copies = rest[0] if rest else []
    check = partial(_check, lists, steps)
    plan = None
    if takes_plan(params) and grads:
        blocks, of_launch = _blocks(params, grads), tuple(lists.values())
        plan = plan_of("adamw_step_", of_launch, segment=blocks.block, check=check, singles=steps)
    else:
        check()
    if not params:
        return
    device = params[0].device
    numbers = _Numbers(
        0.0 if isinstance(lr, Tensor) else float(lr),
        float(betas[0]),
        float(betas[1]),
        float(eps),
        float(weight_decay),
        maximize,
    )
    scalars = _Scalars(
        _scalar("lr", lr, device) if isinstance(lr, Tensor) else None,
        _scalar("grad_scale", grad_scale, device),
        _scalar("found_inf", found_inf, device),
    )
    if plan is not None and plan.singles is not None:
        with on_device(plan.device_index):
            _launch(plan.bundles, blocks, plan.singles, scalars, numbers)
        tell_autograd(chain(params, exp_avgs, exp_avg_sqs, copies, steps))
        return
    tensors = [tensor for tensors in lists.values() for tensor in tensors]
    if takes_reference(tensors):
        # torch.compile cannot take the fused step apart, and fuses the other by itself.
        is_fused = device.type == "cpu" and not torch.compiler.is_compiling()
        in_torch = adamw_step_cpu if is_fused else adamw_step_reference_
        in_torch(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            steps,
            lr=lr if scalars.lr is None else scalars.lr.reshape(()),
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            copies=copies,
            grad_scale=scalars.grad_scale,
            found_inf=scalars.found_inf,
            maximize=maximize,
        )
        return
    _adamw_step(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        copies,
        *scalars,
        *numbers,
    )
