"""Launches of the kernels under `rope_normed`, as torch operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanotron_fast.kernels.rope.normed_kernels import backward_kernel, forward_kernel
from nanotron_fast.kernels.runtime import occupancy
from nanotron_fast.kernels.runtime.launch import Prepared
from nanotron_fast.kernels.runtime.operators import operator
from nanotron_fast.kernels.runtime.sizes import ceil_div, next_power_of_2, unit_of
from nanotron_fast.kernels.runtime.tuning import Tuned, powers_of_2, remembered


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
        # Half the elements a thread of forward, of most heads: it holds two gradients and two sums
        # beside the values. Small programs fill a multiprocessor better: of 128 threads with 72
        # registers seven fit, of 256 with 80 three, and to fit in the 64 that leave four of those
        # Triton 3.6 spills.
        return cls(1024, 8, 8 if head_cols > 128 or has_rest else 4)

    def candidates(self) -> list[_BackwardBlocks]:
        # None of 16 warps where heads are wide or have a rest: those spill.
        shapes = ((512, 8, 4), (1024, 4, 8))
        if self.num_warps == 4:
            shapes = ((2048, 8, 16), (2048, 4, 8), (1024, 8, 8))
        return [_BackwardBlocks(*each) for each in shapes]


class _Kind(NamedTuple):
    """What a launch depends on, beside its strides and device: it is remembered by it.

    Args:
        heads: num_tokens, num_q_heads, num_k_heads and head_dim.
        table: num_positions and half.
        dtypes: of the kernel's tensors, None for what is not there; q's is the first.
        eps, interleaved, zero_centered: as of `rope_normed`.
    """

    heads: tuple[int, int, int, int]
    table: tuple[int, int]
    dtypes: tuple[torch.dtype | None, ...]
    eps: float
    interleaved: bool
    zero_centered: bool

    def blocks(self, tuned: type[Tuned]) -> dict[str, int]:
        """The constants that say how a program's blocks look."""
        (_, num_q_heads, num_k_heads, head_dim), (_, half) = self.heads, self.table
        head_cols, has_rest = next_power_of_2(head_dim), int(2 * half < head_dim)
        itemsize = self.dtypes[0].itemsize
        chosen = tuned.chosen(head_cols=head_cols, has_rest=has_rest, itemsize=itemsize)
        most_heads = max(1, min(chosen.heads, chosen.elements // head_cols))
        q_heads, k_heads = (min(most_heads, next_power_of_2(n)) for n in (num_q_heads, num_k_heads))
        return {
            "HEAD_DIM": head_dim,
            "HALF": half,
            "TOKENS": max(1, min(chosen.elements // (q_heads * head_cols), 32)),
            "Q_HEADS": q_heads,
            "K_HEADS": k_heads,
            "HEAD_COLS": head_cols,
            "HALF_COLS": next_power_of_2(half),
            "num_warps": chosen.num_warps,
        }

    def arguments(
        self, strides: tuple[tuple[int, int], ...], blocks: dict[str, int]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The kernel's numbers and its constants."""
        num_tokens, num_q_heads, num_k_heads, _ = self.heads
        unit = unit_of(*(stride for pair in strides for stride in pair))
        pairs = tuple([(by_token // unit, by_head // unit) for by_token, by_head in strides])
        numbers = (pairs, (num_tokens, self.table[0], num_q_heads, num_k_heads), self.eps)
        flags = {"INTERLEAVED": self.interleaved, "ZERO_CENTERED": self.zero_centered}
        return numbers, {**flags, "STRIDE_UNIT": unit, **blocks}


def _kind(
    q: Tensor, k: Tensor, cos: Tensor, tensors: tuple[Tensor | None, ...], *rest: Any
) -> _Kind:
    (num_tokens, num_q_heads, head_dim), num_k_heads = q.shape, k.shape[1]
    dtypes = tuple([None if tensor is None else tensor.dtype for tensor in tensors])
    num_positions, half = cos.shape
    heads = (num_tokens, num_q_heads, num_k_heads, head_dim)
    return _Kind(heads, (num_positions, half), dtypes, *rest)


def _strides(*tensors: Tensor) -> tuple[tuple[int, int], ...]:
    """Of each tensor those of its tokens and of its heads."""
    return tuple([tensor.stride()[:2] for tensor in tensors])


@remembered
def _prepared_forward(kind: _Kind, strides: tuple[tuple[int, int], ...]) -> Prepared:
    num_tokens, num_q_heads, num_k_heads, _ = kind.heads
    blocks = kind.blocks(_ForwardBlocks)
    numbers, constants = kind.arguments(strides, blocks)
    num_groups = ceil_div(num_q_heads, blocks["Q_HEADS"])
    num_groups += ceil_div(num_k_heads, blocks["K_HEADS"])
    grid = (ceil_div(num_tokens, blocks["TOKENS"]) * num_groups,)
    return Prepared(grid, numbers, **constants)


@remembered
def _prepared_backward(
    kind: _Kind, strides: tuple[tuple[int, int], ...], device: torch.device
) -> Prepared:
    """The launch of as many programs as a GPU holds at once, of a kernel for aligned addresses."""
    blocks = kind.blocks(_BackwardBlocks)
    numbers, constants = kind.arguments(strides, blocks)
    partials = (torch.float32, torch.float32)
    resident = occupancy.resident_programs(
        backward_kernel, (*kind.dtypes, *partials, *numbers), constants, device
    )
    num_programs = min(ceil_div(kind.heads[0], blocks["TOKENS"]), resident)
    return Prepared((num_programs,), numbers, **constants)


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
    tensors = (q, k, q_weight, k_weight, cos, sin, position_ids, *outs)
    kind = _kind(q, k, cos, tensors, eps, interleaved, zero_centered)
    _prepared_forward(kind, _strides(q, k)).launch(forward_kernel, *tensors)
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
    tensors = (dq, dk, q, k, q_weight, k_weight, cos, sin, position_ids, *outs)
    kind = _kind(q, k, cos, tensors, eps, interleaved, zero_centered)
    prepared = _prepared_backward(kind, _strides(dq, dk, q, k), q.device)
    shape = (2, prepared.grid[0], q.shape[2])
    partial = torch.empty(shape, dtype=torch.float32, device=q.device)
    prepared.launch(backward_kernel, *tensors, *partial)
    return outs[0], outs[1], partial.sum(1)


@backward.register_fake
def _(dq, dk, q, k, q_weight, k_weight, cos, sin, position_ids, eps, interleaved, zero_centered):
    dw = q.new_empty(2, q.shape[2], dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), dw
