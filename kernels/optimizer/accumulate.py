"""Gradients added into main gradients in fp32, on lists of tensors.

    main += scale * grad

Bytes an element with bf16 (fp32) gradients: 2 (4) read of the gradient, 4 read and 4 written of
main. `multi_tensor` explains the tables of a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

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
from nanotron_fast.kernels.runtime.launch import on_grid
from nanotron_fast.kernels.runtime.operators import on_device, operator, tell_autograd
from nanotron_fast.kernels.runtime.tuning import Tuned


@dataclass(frozen=True)
class _Blocks(Tuned, operation="accumulate"):
    """`block` elements of a tensor to a program."""

    block: int
    num_warps: int

    @classmethod
    def rule(cls, grad_itemsize: int) -> _Blocks:
        return cls(2048, 4)

    def candidates(self) -> list[_Blocks]:
        return [_Blocks(*each) for each in ((1024, 4), (2048, 8), (4096, 4), (4096, 8))]


def accumulate_reference_(
    mains: Sequence[Tensor], grads: Sequence[Tensor], scale: float = 1.0
) -> None:
    """The same in plain torch; what CPU tensors take."""
    torch._foreach_add_(mains, grads, alpha=scale)


@triton.jit(do_not_specialize=["num_tensors"])
def _accumulate_kernel(
    segment_tensors_ptr,
    extents_ptr,
    addresses_ptr,
    num_tensors,
    scale,
    GRAD: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start, numel = find_segment(
        segment_tensors_ptr, extents_ptr, num_tensors, BLOCK, VECTOR
    )
    main_ptr = pointer(addresses_ptr, num_tensors, tensor, 0, tl.float32, VECTOR)
    grad_ptr = pointer(addresses_ptr, num_tensors, tensor, 1, GRAD, VECTOR)
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < numel
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    main = tl.load(main_ptr + offsets, mask=mask, other=0.0)
    tl.store(main_ptr + offsets, main + scale * grad, mask=mask)


@operator("nanotron_fast::accumulate_", mutates_args=("mains",))
def _accumulate(mains: list[Tensor], grads: list[Tensor], scale: float) -> None:
    blocks = _Blocks.chosen(grad_itemsize=grads[0].element_size())
    _launch(bundles_of((mains, grads), blocks.block), blocks, scale)


def _launch(bundles: Sequence[Bundle], blocks: _Blocks, scale: float) -> None:
    for bundle in bundles:
        on_grid(_accumulate_kernel, (bundle.num_segments,))(
            *bundle.tables,
            scale,
            GRAD=TRITON_DTYPES[bundle.dtypes[1]],
            VECTOR=bundle.vector,
            BLOCK=blocks.block,
            num_warps=blocks.num_warps,
        )


def _check(mains: list[Tensor], grads: list[Tensor]) -> None:
    check_lists("accumulate_", "mains", mains=mains, grads=grads)
    for place, main in enumerate(mains):
        if main.dtype != torch.float32:
            raise ValueError(f"accumulate_: mains[{place}] is {main.dtype}, not torch.float32")


@torch.no_grad()
def accumulate_(mains: Sequence[Tensor], grads: Sequence[Tensor], scale: float = 1.0) -> None:
    """Adds gradients into main gradients: main += scale * grad.

    Args:
        mains: fp32, contiguous, written in place. DTensors are added to where they lie; their
            gradients have their mesh and placements.
        grads: the shapes of mains, bf16, fp16 or fp32 in any mixture, contiguous.
        scale: a factor on the gradients, 1 / accumulation steps for instance.

    Raises:
        ValueError: lists do not fit, or a tensor is not contiguous; named by its place.
    """
    lists = {"mains": list(mains), "grads": list(grads)}
    mains, grads = shards.local("accumulate_", lists, written=("mains",)).values()
    if takes_plan(mains) and grads:
        check = partial(_check, mains, grads)
        blocks = _Blocks.chosen(grad_itemsize=grads[0].element_size())
        plan = plan_of("accumulate_", (mains, grads), segment=blocks.block, check=check)
        if plan.is_served:
            with on_device(plan.device_index):
                _launch(plan.bundles, blocks, float(scale))
            tell_autograd(mains)
            return
    _check(mains, grads)
    if not mains:
        return
    if takes_reference(mains + grads):
        accumulate_reference_(mains, grads, scale)
    else:
        _accumulate(mains, grads, float(scale))
