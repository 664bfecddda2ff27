"""Launches of the kernels under `rope_normed`, as torch operators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanotron_fast.kernels.rope.normed_kernels import backward_kernel, forward_kernel
from nanotron_fast.kernels.runtime import occupancy
from nanotron_fast.kernels.runtime.launch import on_grid
from nanotron_fast.kernels.runtime.operators import operator
from nanotron_fast.kernels.runtime.sizes import ceil_div, next_power_of_2, unit_of
from nanotron_fast.kernels.runtime.tuning import Tuned, powers_of_2


@dataclass(frozen=True)
class _ForwardBlocks(Tuned, operation="rope_normed_forward", heads=powers_of_2(1, 64)):
    """`elements` that a program holds at a time of each tensor, of up to `heads` heads."""

    elements: int
    heads: int
    num_warps: int

    @classmethod
    def rule(cls, head_cols: int, has_rest: int, itemsize: int) -> _ForwardBlocks:
        # Fewer of wide heads, and where a part of a head does not turn, which lies in registers of
        # its own.
        return cls(1024 if head_cols > 128 or has_rest else 2048, 8, 4)

    def candidates(self) -> list[_ForwardBlocks]:
        # None with fewer than 1024: with a rest, 512 spill on sm_90.
        twice = 2 * self.elements
        shapes = ((1024, 8, 4), (self.elements, 4, 4), (self.elements, 8, 8), (twice, 8, 8))
        return [type(self)(*each) for each in shapes]


@dataclass(frozen=True)
class _BackwardBlocks(_ForwardBlocks, operation="rope_normed_backward"):
    @classmethod
    def rule(cls, head_cols: int, has_rest: int, itemsize: int) -> _BackwardBlocks:
        # Twice the threads of forward: a thread holds two gradients and two sums beside the values.
        return cls(1024 if head_cols > 128 or has_rest else 2048, 8, 8)

    def candidates(self) -> list[_BackwardBlocks]:
        shapes = ((self.elements // 2, 8, 4), (self.elements, 4, 8), (self.elements, 8, 16))
        return [_BackwardBlocks(*each) for each in shapes]


def _blocks(tuned: type[Tuned], q: Tensor, k: Tensor, cos: Tensor) -> dict[str, int]:
    """The constants that say how a program's blocks look."""
    head_dim = q.shape[2]
    head_cols, has_rest = next_power_of_2(head_dim), int(2 * cos.shape[1] < head_dim)
    chosen = tuned.chosen(head_cols=head_cols, has_rest=has_rest, itemsize=q.element_size())
    most_heads = max(1, min(chosen.heads, chosen.elements // head_cols))
    q_heads, k_heads = (min(most_heads, next_power_of_2(x.shape[1])) for x in (q, k))
    return {
        "HEAD_DIM": head_dim,
        "HALF": cos.shape[1],
        "TOKENS": max(1, min(chosen.elements // (q_heads * head_cols), 32)),
        "Q_HEADS": q_heads,
        "K_HEADS": k_heads,
        "HEAD_COLS": head_cols,
        "HALF_COLS": next_power_of_2(cos.shape[1]),
        "num_warps": chosen.num_warps,
    }


def _strides(*tensors: Tensor) -> tuple[list[int], int]:
    """Those of tokens and heads of each tensor, in a unit, and the unit."""
    strides = [stride for tensor in tensors for stride in tensor.stride()[:2]]
    unit = unit_of(*strides)
    return [stride // unit for stride in strides], unit


@operator("nanotron_fast::rope_normed_forward")
def forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    eps: float,
    interleaved: bool,
    zero_centered: bool,
) -> tuple[Tensor, Tensor]:
    """q and k turned, contiguous. The last dims of q and k, and all others, are contiguous."""
    outs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k)]
    if len(q):
        blocks = _blocks(_ForwardBlocks, q, k, cos)
        strides, unit = _strides(q, k)
        num_groups = ceil_div(q.shape[1], blocks["Q_HEADS"])
        num_groups += ceil_div(k.shape[1], blocks["K_HEADS"])
        on_grid(forward_kernel, (ceil_div(len(q), blocks["TOKENS"]) * num_groups,))(
            *(q, k, q_weight, k_weight, cos, sin, position_ids, *outs, *strides),
            *(len(q), len(cos), q.shape[1], k.shape[1], eps),
            INTERLEAVED=interleaved,
            ZERO_CENTERED=zero_centered,
            STRIDE_UNIT=unit,
            **blocks,
        )
    return outs[0], outs[1]


@forward.register_fake
def _(q, k, q_weight, k_weight, cos, sin, position_ids, eps, interleaved, zero_centered):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@operator("nanotron_fast::rope_normed_backward")
def backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    eps: float,
    interleaved: bool,
    zero_centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q and k, and of both weights in fp32 (2, d), from those of the results."""
    outs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k)]
    if not len(q):
        return outs[0], outs[1], q.new_zeros(2, q.shape[2], dtype=torch.float32)
    blocks = _blocks(_BackwardBlocks, q, k, cos)
    tensors = (dq, dk, q, k, q_weight, k_weight, cos, sin, position_ids, *outs)
    strides, unit = _strides(dq, dk, q, k)
    numbers = [*strides, len(q), len(cos), q.shape[1], k.shape[1], eps]
    constants = {
        "INTERLEAVED": interleaved,
        "ZERO_CENTERED": zero_centered,
        "STRIDE_UNIT": unit,
        **blocks,
    }
    resident = occupancy.resident_programs(
        backward_kernel,
        (*tensors, torch.float32, torch.float32, *numbers),
        constants,
        q.device,
    )
    num_programs = min(ceil_div(len(q), blocks["TOKENS"]), resident)
    partial = torch.empty(2, num_programs, q.shape[2], dtype=torch.float32, device=q.device)
    on_grid(backward_kernel, (num_programs,))(*tensors, *partial, *numbers, **constants)
    return outs[0], outs[1], partial.sum(1)


@backward.register_fake
def _(dq, dk, q, k, q_weight, k_weight, cos, sin, position_ids, eps, interleaved, zero_centered):
    dw = q.new_empty(2, q.shape[2], dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), dw
