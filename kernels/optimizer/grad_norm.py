"""The total norm of lists of gradients, and clipping to it.

    get_total_norm            norm = (sum |g|^p)^(1/p) over all elements, max |g| for p = inf
    clip_grads_with_norm_     g *= min(max_norm / (norm + 1e-6), 1)

All of it in fp32 and rounded once. Sums are taken in a fixed order, a segment at a time and then a
tensor at a time, so a norm is the same in every run. Bytes an element, with bf16 (fp32) gradients:
the norm 2 (4) read; clipping 2 (4) read and as many written, and nothing where the norm is within
its bound. Nothing waits for the device. `multi_tensor` explains the tables of a launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanotron_fast.kernels.optimizer import shards
from nanotron_fast.kernels.optimizer.multi_tensor import (
    TRITON_DTYPES,
    Bundle,
    bundles_of,
    check_lists,
    find_segment,
    pointer,
    takes_reference,
)
from nanotron_fast.kernels.optimizer.plan import plan_of, takes_plan
from nanotron_fast.kernels.runtime.collectives import (
    Group,
    Ranks,
    all_gather,
    all_reduce,
    resolve,
)
from nanotron_fast.kernels.runtime.launch import on_grid
from nanotron_fast.kernels.runtime.operators import on_device, operator, tell_autograd
from nanotron_fast.kernels.runtime.tuning import Tuned, powers_of_2

_PARTIALS_BLOCK = 1024
# Elements that plain torch sums in one go.
_RUN = 4096


@dataclass(frozen=True)
class _NormBlocks(
    Tuned,
    operation="grad_norm",
    segment=powers_of_2(4096, 2**20),
    block=powers_of_2(16, 4096),
):
    """`segment` elements of a tensor to a program, `block` at a time: a segment is whole blocks."""

    segment: int
    block: int
    num_warps: int

    @classmethod
    def rule(cls, itemsize: int) -> _NormBlocks:
        # A program of the norm writes one number, and one that need not clip ends at once: a few
        # programs with long segments are better than many.
        return cls(16384, 2048, 4)

    def candidates(self) -> list[_NormBlocks]:
        shapes = ((8192, 2048, 4), (16384, 4096, 8), (32768, 2048, 4), (32768, 4096, 8))
        return [type(self)(*each) for each in shapes]


class _ClipBlocks(_NormBlocks, operation="clip_grads"):
    """The same where gradients are scaled."""


def power_sums_reference(grads: Sequence[Tensor], norm_type: float) -> Tensor:
    """(tensors,) sums of |g|^p, or max |g| for p = inf, in plain torch, at least in fp32."""
    wide = reduce(torch.promote_types, (grad.dtype for grad in grads), torch.float32)
    sums = torch.zeros(len(grads), dtype=wide, device=grads[0].device)
    for place, grad in enumerate(grads):
        if grad.numel():
            sums[place] = _power_sum(grad.reshape(-1), norm_type, wide)
    return sums


def _power_sum(flat: Tensor, norm_type: float, wide: torch.dtype) -> Tensor:
    """Of runs, and over them in fp64: torch's own sum of many squares in fp32 loses what is small
    beside it, on a CPU a two-thousandth of the norm of 12 million elements.
    """
    num_runs = flat.numel() // _RUN
    whole = num_runs * _RUN
    runs = flat[:whole].view(num_runs, _RUN)
    parts = [torch.linalg.vector_norm(runs, norm_type, dim=1, dtype=wide)]
    if whole < flat.numel():
        parts.append(torch.linalg.vector_norm(flat[whole:], norm_type, dtype=wide).view(1))
    norms = torch.cat(parts)
    return norms.amax() if math.isinf(norm_type) else norms.double().pow(norm_type).sum()


def clip_reference_(grads: Sequence[Tensor], max_norm: float, total_norm: Tensor) -> None:
    """The same in plain torch; what CPU tensors take."""
    coefficient = torch.clamp(max_norm / (total_norm + 1e-6), max=1.0)
    for grad in grads:
        # Not mul_: it would round the coefficient to the gradient's dtype on a GPU.
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad.copy_(grad.to(wide) * coefficient)


@triton.jit(do_not_specialize=["num_tensors"])
def _power_sums_kernel(
    segment_tensors_ptr,
    extents_ptr,
    addresses_ptr,
    num_tensors,
    partials_ptr,
    norm_type,
    NORM: tl.constexpr,
    GRAD: tl.constexpr,
    VECTOR: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start, numel = find_segment(
        segment_tensors_ptr, extents_ptr, num_tensors, SEGMENT, VECTOR
    )
    grad_ptr = pointer(addresses_ptr, num_tensors, tensor, 0, GRAD, VECTOR)
    # Magnitudes are compared as integers, which order like them, with NaN above infinity.
    total = tl.zeros((BLOCK,), dtype=tl.int32 if NORM == "inf" else tl.float32)
    for block_start in tl.range(0, SEGMENT, BLOCK):
        offsets = start + block_start + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + offsets, mask=offsets < numel, other=0.0).to(tl.float32)
        if NORM == "inf":
            total = tl.maximum(total, tl.abs(grad).to(tl.int32, bitcast=True))
        elif NORM == "1":
            total += tl.abs(grad)
        elif NORM == "2":
            total += grad * grad
        else:
            total += tl.exp2(norm_type * tl.log2(tl.abs(grad)))
    if NORM == "inf":
        partial = tl.max(total, axis=0).to(tl.float32, bitcast=True)
    else:
        partial = tl.sum(total, axis=0)
    tl.store(partials_ptr + tl.program_id(0), partial)


@triton.jit(do_not_specialize=["num_tensors"])
def _reduce_kernel(
    partials_ptr,
    extents_ptr,
    sums_ptr,
    num_tensors,
    NORM: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor = tl.program_id(0)
    num_segments = tl.cdiv(tl.load(extents_ptr + tensor), SEGMENT)
    first_segment = tl.load(extents_ptr + num_tensors + tensor)
    place = tl.load(extents_ptr + 2 * num_tensors + tensor)
    total = tl.zeros((BLOCK,), dtype=tl.int32 if NORM == "inf" else tl.float32)
    for block_start in tl.range(0, num_segments, BLOCK):
        offsets = block_start + tl.arange(0, BLOCK)
        partial = tl.load(
            partials_ptr + first_segment + offsets, mask=offsets < num_segments, other=0.0
        )
        if NORM == "inf":
            total = tl.maximum(total, partial.to(tl.int32, bitcast=True))
        else:
            total += partial
    if NORM == "inf":
        result = tl.max(total, axis=0).to(tl.float32, bitcast=True)
    else:
        result = tl.sum(total, axis=0)
    tl.store(sums_ptr + place, result)


@triton.jit(do_not_specialize=["num_tensors"])
def _clip_kernel(
    segment_tensors_ptr,
    extents_ptr,
    addresses_ptr,
    num_tensors,
    total_norm_ptr,
    max_norm,
    GRAD: tl.constexpr,
    VECTOR: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    coefficient = max_norm / (tl.load(total_norm_ptr) + 1e-6)
    # NaN is not above one: it goes into the gradients, as torch has it.
    if coefficient >= 1.0:
        return
    tensor, start, numel = find_segment(
        segment_tensors_ptr, extents_ptr, num_tensors, SEGMENT, VECTOR
    )
    grad_ptr = pointer(addresses_ptr, num_tensors, tensor, 0, GRAD, VECTOR)
    for block_start in tl.range(0, SEGMENT, BLOCK):
        offsets = start + block_start + tl.arange(0, BLOCK)
        mask = offsets < numel
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_ptr + offsets, (grad * coefficient).to(GRAD), mask=mask)


@operator("nanotron_fast::grad_power_sums")
def _power_sums(grads: list[Tensor], norm_type: float) -> Tensor:
    """(tensors,) fp32 sums of |g|^p, or max |g| for p = inf; 0 for an empty tensor."""
    blocks = _NormBlocks.chosen(itemsize=grads[0].element_size())
    return _launch_sums(grads, bundles_of((grads,), blocks.segment), blocks, norm_type)


@_power_sums.register_fake
def _(grads, norm_type):
    return grads[0].new_empty(len(grads), dtype=torch.float32)


def _launch_sums(
    grads: Sequence[Tensor], bundles: Sequence[Bundle], blocks: _NormBlocks, norm_type: float
) -> Tensor:
    sums = torch.zeros(len(grads), dtype=torch.float32, device=grads[0].device)
    norm = {1.0: "1", 2.0: "2", math.inf: "inf"}.get(norm_type, "p")
    for bundle in bundles:
        partials = torch.empty(bundle.num_segments, dtype=torch.float32, device=sums.device)
        on_grid(_power_sums_kernel, (bundle.num_segments,))(
            *bundle.tables,
            partials,
            norm_type,
            NORM=norm,
            GRAD=TRITON_DTYPES[bundle.dtypes[0]],
            VECTOR=bundle.vector,
            SEGMENT=blocks.segment,
            BLOCK=blocks.block,
            num_warps=blocks.num_warps,
        )
        on_grid(_reduce_kernel, (bundle.num_tensors,))(
            partials,
            bundle.extents,
            sums,
            bundle.num_tensors,
            NORM=norm,
            SEGMENT=blocks.segment,
            BLOCK=_PARTIALS_BLOCK,
            num_warps=4,
        )
    return sums


@operator("nanotron_fast::clip_grads_", mutates_args=("grads",))
def _clip(grads: list[Tensor], max_norm: float, total_norm: Tensor) -> None:
    blocks = _ClipBlocks.chosen(itemsize=grads[0].element_size())
    _launch_clip(bundles_of((grads,), blocks.segment), blocks, max_norm, total_norm)


def _launch_clip(
    bundles: Sequence[Bundle], blocks: _ClipBlocks, max_norm: float, total_norm: Tensor
) -> None:
    for bundle in bundles:
        on_grid(_clip_kernel, (bundle.num_segments,))(
            *bundle.tables,
            total_norm,
            max_norm,
            GRAD=TRITON_DTYPES[bundle.dtypes[0]],
            VECTOR=bundle.vector,
            SEGMENT=blocks.segment,
            BLOCK=blocks.block,
            num_warps=blocks.num_warps,
        )


def _sums(grads: list[Tensor], norm_type: float) -> Tensor:
    """(tensors,) sums of |g|^p, or max |g|, by the path that the gradients take."""
    check = partial(check_lists, "get_total_norm", "grads", grads=grads)
    if takes_plan(grads):
        blocks = _NormBlocks.chosen(itemsize=grads[0].element_size())
        plan = plan_of("get_total_norm", (grads,), segment=blocks.segment, check=check)
        if plan.is_served:
            with on_device(plan.device_index):
                return _launch_sums(grads, plan.bundles, blocks, norm_type)
    check()
    if takes_reference(grads):
        return power_sums_reference(grads, norm_type).float()
    return _power_sums(grads, norm_type)


def _total(sums: Tensor, is_max: bool, groups: Sequence[Ranks]) -> Tensor:
    """(1,), the sum or the maximum of what a rank has, over all ranks of some groups."""
    total = sums.amax(0, keepdim=True) if is_max else sums.sum(0, keepdim=True)
    for ranks in groups:
        # One number from each rank: gathering them is no dearer than a reduction by max.
        total = all_gather(total, ranks).amax(0) if is_max else all_reduce(total, ranks)
    return total


@torch.no_grad()
def get_total_norm(
    grads: Sequence[Tensor],
    norm_type: float = 2.0,
    group: Group = None,
    *,
    error_if_nonfinite: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """The norm of all gradients as one vector, over all ranks of a group.

    Args:
        grads: contiguous, bf16, fp16 or fp32 in any mixture. A parameter that several ranks of
            the group hold (tied, or replicated over tensor parallelism) belongs in the list of
            one of them alone. DTensors count as a whole, by a collective for each dimension of a
            mesh that splits some of them.
        norm_type: p > 0, or inf.
        group: the ranks that share the parameters; every one of them must call. One collective.
            Not those of a DTensor's own mesh.
        error_if_nonfinite: raise RuntimeError for a norm that is not finite. Waits for the device.
        device: of the result where the list is empty; the current GPU by default, if there is one.

    Returns:
        0-d, fp32, on the device of the gradients.

    Raises:
        ValueError: no such norm; a tensor that is not contiguous, or a DTensor that is yet to be
            summed; named by its place.
    """
    grads, norm_type = list(grads), float(norm_type)
    if not norm_type > 0:
        raise ValueError(f"get_total_norm: norm_type {norm_type}: choose p > 0, or inf")
    is_max = math.isinf(norm_type)
    if grads:
        parts = []
        for part, ranks in shards.by_ranks("get_total_norm", "grads", grads):
            own = _sums(part, norm_type)
            parts.append(_total(own, is_max, ranks) if ranks else own)
        sums = parts[0] if len(parts) == 1 else torch.cat(parts)
    else:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        sums = torch.zeros(1, dtype=torch.float32, device=default if device is None else device)
    total = _total(sums, is_max, [resolve(group)]).reshape(())
    if not is_max and norm_type != 1.0:
        total = total.sqrt() if norm_type == 2.0 else total.pow(1.0 / norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(
            f"the total norm of order {norm_type} of the gradients is {total.item()}: "
            "they cannot be clipped"
        )
    return total


@torch.no_grad()
def clip_grads_with_norm_(grads: Sequence[Tensor], max_norm: float, total_norm: Tensor) -> None:
    """Multiplies gradients by min(max_norm / (total_norm + 1e-6), 1) on the device.

    Nothing is written where that is 1. Where it is NaN, gradients become NaN, as with torch.

    Args:
        grads: contiguous, bf16, fp16 or fp32 in any mixture, written in place; DTensors where they
            lie.
        max_norm: the bound.
        total_norm: 0-d, fp32, on their device, from `get_total_norm`; torch's may be a DTensor.

    Raises:
        ValueError: a tensor is not contiguous, named by its place; the norm is not one number.
    """
    name = "clip_grads_with_norm_"
    (grads,) = shards.local(name, {"grads": list(grads)}, written=("grads",)).values()
    if total_norm.numel() != 1:
        raise ValueError(f"{name}: total_norm {tuple(total_norm.shape)}")
    total_norm = shards.whole(total_norm)
    check = partial(check_lists, name, "grads", grads=grads)
    if takes_plan(grads):
        blocks = _ClipBlocks.chosen(itemsize=grads[0].element_size())
        plan = plan_of(name, (grads,), segment=blocks.segment, check=check)
        if plan.is_served:
            with on_device(plan.device_index):
                on_gpu = total_norm.to(grads[0].device, torch.float32)
                _launch_clip(plan.bundles, blocks, float(max_norm), on_gpu)
            tell_autograd(grads)
            return
    check()
    if not grads:
        return
    if takes_reference(grads):
        clip_reference_(grads, max_norm, total_norm)
    else:
        _clip(grads, float(max_norm), total_norm.to(grads[0].device, torch.float32))


def clip_grad_norm_(
    grads: Sequence[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    group: Group = None,
    error_if_nonfinite: bool = False,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Clips gradients to a total norm, as torch.nn.utils.clip_grad_norm_ does, and gives the norm.

    The norm is taken in fp32 whatever the gradients' dtype, over all ranks of `group`: see
    `get_total_norm` for the arguments and errors, `clip_grads_with_norm_` for what is written.
    """
    total_norm = get_total_norm(
        grads, norm_type, group, error_if_nonfinite=error_if_nonfinite, device=device
    )
    clip_grads_with_norm_(grads, max_norm, total_norm)
    return total_norm
