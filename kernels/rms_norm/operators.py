"""Launches of the kernels under `rms_norm`, as torch operators."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanotron_fast.kernels.rms_norm.kernels import backward_kernel, forward_kernel
from nanotron_fast.kernels.rms_norm.part_kernels import forward_by_parts_kernel, means_kernel
from nanotron_fast.kernels.runtime import occupancy
from nanotron_fast.kernels.runtime.launch import Prepared
from nanotron_fast.kernels.runtime.operators import operator
from nanotron_fast.kernels.runtime.rows import as_rows, empty_rows, with_stride
from nanotron_fast.kernels.runtime.sizes import ceil_div, next_power_of_2, unit_of
from nanotron_fast.kernels.runtime.tuning import Tuned, powers_of_2, remembered

# The widest rows that are in registers as a whole; wider ones are in parts.
_MAX_WHOLE = 16384
# Bytes of the parts that a program goes through: one access of 16 for each of 1024 threads. So it
# takes 32 registers of a thread, and a multiprocessor has two programs.
_LOOP_BYTES, _LOOP_WARPS = 16384, 32
# Columns of the parts that have programs of their own. There are nine at least, so that a ninth of
# the programs has less to do at most: those of the last part.
_PART_COLS = 2048
# Elements of a block of several short rows.
_BLOCK_ELEMENTS = 4096
# The widest rows whose weight stays in registers through the backward pass.
_MAX_KEPT = 8192
# A block is on its way while another is computed, and the one after it as soon as that is read.
_MAX_STAGES = 3
# Shared memory that the copies leave for r of the rows, and for what the warps of a sum exchange.
_SCRATCH_BYTES = 1024


@dataclass(frozen=True)
class _ForwardBlocks(Tuned, operation="rms_norm_forward", rows=powers_of_2(1, 16)):
    """`rows` to a program."""

    rows: int
    num_warps: int

    @classmethod
    def rule(cls, cols: int, itemsize: int) -> _ForwardBlocks:
        rows = max(1, min(16, _BLOCK_ELEMENTS // cols))
        if cols > _MAX_KEPT:
            return cls(rows, 32)
        # Where a block has several rows, a thread holds fewer values: the rows' numbers and masks
        # take registers too.
        return cls(rows, max(rows * cols // (512 if rows > 1 else 1024), 4))

    def candidates(self) -> list[_ForwardBlocks]:
        # No more values to a thread than by the rule: they would spill.
        more = replace(self, num_warps=min(2 * self.num_warps, 32))
        if self.rows == 1:
            return [more]
        half = replace(self, rows=self.rows // 2)
        return [more, half, replace(half, num_warps=max(self.num_warps // 2, 4))]


@dataclass(frozen=True)
class _BackwardBlocks(_ForwardBlocks, operation="rms_norm_backward"):
    """`stages`: at most, where shared memory and the width of the accesses allow any."""

    stages: int

    @classmethod
    def rule(cls, cols: int, itemsize: int) -> _BackwardBlocks:
        forward = _ForwardBlocks.rule(cols, itemsize)
        return cls(forward.rows, forward.num_warps, _MAX_STAGES)

    def candidates(self) -> list[_BackwardBlocks]:
        return [*super().candidates(), replace(self, stages=2), replace(self, stages=1)]


def _stages(block_bytes: int, cols: int, copy_bytes: int, device: torch.device) -> int:
    """Stages of the loop of the backward pass: there are copies of all blocks but one.

    Args:
        block_bytes: of all that an iteration reads.
        cols: of a block. Past _MAX_KEPT one block takes all registers of a multiprocessor, so that
            nothing is read there while it is computed, unless the next row is on its way: that
            takes two copies.
        copy_bytes: of one copy. Short ones cost more registers than they save time.
        device: whose shared memory holds the copies.
    """
    copies = (occupancy.shared_memory_limit(device) - _SCRATCH_BYTES) // block_bytes
    if copy_bytes < 16 or copies < (2 if cols > _MAX_KEPT else 1):
        return 1
    return min(_MAX_STAGES, copies + 1)


@remembered
def _prepared_forward(
    num_rows: int,
    hidden: int,
    itemsize: int,
    strides: tuple[int, int],
    eps: float,
    **constants: bool,
) -> Prepared:
    """The launch with strides of the rows of x and the residual."""
    cols, unit = next_power_of_2(hidden), unit_of(*strides, hidden)
    blocks = _ForwardBlocks.chosen(cols=cols, itemsize=itemsize)
    return Prepared(
        (ceil_div(num_rows, blocks.rows),),
        (*[stride // unit for stride in strides], num_rows, hidden // unit, eps),
        **constants,
        UNIT=unit,
        ROWS=blocks.rows,
        COLS=cols,
        num_warps=blocks.num_warps,
    )


@remembered
def _prepared_by_parts(
    num_rows: int,
    hidden: int,
    itemsize: int,
    strides: tuple[int, int],
    *numbers: float,
    **constants: bool,
) -> Prepared:
    """The launch of a program for each row, with the strides of what it reads."""
    unit = unit_of(*strides, hidden)
    return Prepared(
        (num_rows,),
        (*[stride // unit for stride in strides], hidden // unit, *numbers),
        **constants,
        UNIT=unit,
        COLS=_LOOP_BYTES // itemsize,
        num_warps=_LOOP_WARPS,
    )


@remembered
def _prepared_backward(
    num_rows: int,
    hidden: int,
    dtypes: tuple[torch.dtype | None, ...],
    strides: tuple[int, int, int],
    zero_centered: bool,
    device: torch.device,
) -> Prepared:
    """The launch of as many programs as a GPU holds at once.

    Args:
        dtypes: of dy, dh_out, h, weight, rstd, means and dx, None for what is not there. Means
            are there for rows that are in parts.
        strides: of the rows of dy, dh_out and h.
        device: whose programs are counted, those of a kernel for aligned addresses.
    """
    _, dh_out, h, *_, means, _ = dtypes
    cols = next_power_of_2(hidden) if means is None else _PART_COLS
    blocks = _BackwardBlocks.chosen(cols=cols, itemsize=h.itemsize)
    # The kernel takes a wide row as a number: it is alone in its block.
    rows, num_warps = blocks.rows if cols <= _MAX_KEPT else 1, blocks.num_warps
    block_bytes = (2 if dh_out is None else 3) * rows * cols * h.itemsize
    unit = unit_of(*strides, hidden)
    numbers = (*(stride // unit for stride in strides), num_rows, hidden // unit)
    stages = _stages(block_bytes, cols, unit * h.itemsize, device)
    if cols <= _MAX_KEPT and stages == 1:
        # Rows that are read value by value take more registers for each.
        num_warps = max(rows * cols // 512, num_warps)
    constants = {
        "HAS_DH_OUT": dh_out is not None,
        "ZERO_CENTERED": zero_centered,
        "UNIT": unit,
        "ROWS": rows,
        "COLS": cols,
        # The weight of wide rows does not fit in registers beside the rest: it is read with each.
        "KEEP_WEIGHT": cols <= _MAX_KEPT,
        "STAGES": min(stages, blocks.stages),
        "num_warps": num_warps,
    }
    resident = occupancy.resident_programs(
        backward_kernel, (*dtypes, torch.float32, *numbers), constants, device
    )
    num_parts = 1 if means is None else ceil_div(hidden, cols)
    num_programs = min(ceil_div(num_rows, rows), max(resident // num_parts, 1))
    return Prepared((num_programs, num_parts), numbers, **constants)


@operator("nanotron_fast::rms_norm_forward")
def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, zero_centered: bool
) -> list[Tensor]:
    """y and, with a residual, h (..., hidden) in x's dtype; and rstd (rows,) fp32."""
    shape, y = x.shape, empty_rows(x)
    num_rows, hidden = math.prod(shape[:-1]), shape[-1]
    h = None if residual is None else empty_rows(x)
    rstd = x.new_empty(num_rows, dtype=torch.float32)
    x, x_stride = with_stride(x)
    residual, residual_stride = (None, 0) if residual is None else with_stride(residual)
    strides = (x_stride, residual_stride)
    constants = {"HAS_RESIDUAL": h is not None, "ZERO_CENTERED": zero_centered}
    is_whole = hidden <= _MAX_WHOLE
    prepare = _prepared_forward if is_whole else _prepared_by_parts
    prepared = prepare(num_rows, hidden, x.element_size(), strides, eps, **constants)
    kernel = forward_kernel if is_whole else forward_by_parts_kernel
    prepared.launch(kernel, x, residual, weight, y, h, rstd)
    return [y, rstd] if h is None else [y, h, rstd]


@forward.register_fake
def _(x, residual, weight, eps, zero_centered):
    outs = [x.new_empty(x.shape) for each in (x, residual) if each is not None]
    return [*outs, x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)]


@operator("nanotron_fast::rms_norm_backward")
def backward(
    dy: Tensor,
    dh_out: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    zero_centered: bool,
) -> tuple[Tensor, Tensor]:
    """dx (..., hidden) in h's dtype and dw (hidden,) in the weight's."""
    dx = h.new_empty(h.shape)
    dy, h = as_rows(dy), as_rows(h)
    dh_out = None if dh_out is None else as_rows(dh_out)
    num_rows, hidden = h.shape
    if not num_rows:
        return dx, torch.zeros_like(weight)
    means = None
    strides = (dy.stride(0), 0 if dh_out is None else dh_out.stride(0), h.stride(0))
    if hidden > _MAX_WHOLE:
        means = torch.empty_like(rstd)
        prepared = _prepared_by_parts(
            num_rows, hidden, h.element_size(), strides[::2], ZERO_CENTERED=zero_centered
        )
        prepared.launch(means_kernel, dy, h, weight, rstd, means)
    tensors = (dy, dh_out, h, weight, rstd, means, dx)
    dtypes = tuple([None if each is None else each.dtype for each in tensors])
    prepared = _prepared_backward(num_rows, hidden, dtypes, strides, zero_centered, h.device)
    partial_dw = torch.empty(prepared.grid[0], hidden, dtype=torch.float32, device=h.device)
    prepared.launch(backward_kernel, *tensors, partial_dw)
    return dx, partial_dw.sum(0).to(weight.dtype)


@backward.register_fake
def _(dy, dh_out, h, weight, rstd, zero_centered):
    return h.new_empty(h.shape), weight.new_empty(weight.shape)
