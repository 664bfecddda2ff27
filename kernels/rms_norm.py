"""RMSNorm, with the residual add in the same pass.

    h = x + residual                      (rounded to x's dtype, as an add of its own would)
    y = h / sqrt(mean(h^2) + eps) * w     (w + 1 with a zero-centred weight)

All of it in fp32 and rounded once, into y. Backward, with r = 1 / sqrt(mean(h^2) + eps), n = h * r
and g = dy * w:

    dh = (g - n * mean(g * n)) * r + dh_out        dx = dresidual = dh
    dw = sum over rows of dy * n

Bytes for (rows, hidden) of two-byte elements: forward 4 an element, 8 with the residual; backward
6, 8 with the residual. Saved for backward: h, the weight and r (4 bytes a row).
A row is in registers as a whole, and its share of dw with it. In backward one of more than 8192
columns takes all registers of a multiprocessor, so the next row of two-byte elements is copied to
shared memory meanwhile: 128 KB for two rows, 192 KB with the residual; where there is less (sm_80
has 163 KB) it is read when its turn comes. Programs of a part of the columns each would need the
sums of g * n first: h and dy would be read twice, 10 bytes an element, 12 with the residual.
Accesses are as wide as suits all rows: 16 bytes where hidden is a multiple of 8. Within each row of
an odd hidden there are aligned vectors too, but they begin at other columns in every row, so that
neither the weight nor the sums of dw could stay with a thread.
Shapes: x, residual, y, h (..., hidden); weight (hidden,); r (rows,) fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanotron_fast.kernels.runtime import occupancy
from nanotron_fast.kernels.runtime.backend import uses_triton
from nanotron_fast.kernels.runtime.launch import Prepared, on_grid
from nanotron_fast.kernels.runtime.operators import operator
from nanotron_fast.kernels.runtime.rows import as_rows, empty_rows, with_stride
from nanotron_fast.kernels.runtime.sizes import ceil_div, next_power_of_2, unit_of
from nanotron_fast.kernels.runtime.tuning import Tuned, powers_of_2, remembered

# A row lies in one block: past this, registers spill and the reference is used.
_MAX_HIDDEN = 16384
# Elements of a block of several short rows.
_BLOCK_ELEMENTS = 4096
# The widest rows whose weight stays in registers through the backward pass.
_MAX_KEPT = 8192
# A block is on its way while another is computed, and the one after it as soon as that is read.
_MAX_STAGES = 3
# Shared memory that the copies leave for r of the rows, and for what the warps of a sum exchange.
_SCRATCH_BYTES = 1024


def rms_norm_reference(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    zero_centered: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same in plain torch, at least in fp32; what torch.compile takes on a CPU."""
    h = x if residual is None else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    values = h.to(wide)
    factor = _factor(weight, wide, zero_centered)
    normed = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    y = (normed * factor).to(x.dtype)
    return y if residual is None else (y, h)


@triton.jit
def _load_weight(weight_ptr, cols, num_cols, ZERO_CENTERED: tl.constexpr):
    weight = tl.load(weight_ptr + cols, mask=cols < num_cols, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        weight += 1.0
    return weight


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    h_ptr,
    rstd_ptr,
    x_row_units,
    residual_row_units,
    num_rows,
    num_units,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    num_cols = num_units * UNIT
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    mask = (rows < num_rows) & (cols < num_cols)
    h = tl.load(x_ptr + rows * x_row_units * UNIT + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(
            residual_ptr + rows * residual_row_units * UNIT + cols, mask=mask, other=0.0
        ).to(tl.float32)
        rounded = (h + residual).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + rows * num_cols + cols, rounded, mask=mask)
        h = rounded.to(tl.float32)
    weight = _load_weight(weight_ptr, cols, num_cols, ZERO_CENTERED)
    rstd = 1.0 / tl.sqrt(tl.sum(h * h, axis=1, keep_dims=True) / num_cols + eps)
    y = h * rstd * weight
    tl.store(y_ptr + rows * num_cols + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit
def _backward_kernel(
    dy_ptr,
    dh_out_ptr,
    h_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_dw_ptr,
    dy_row_units,
    dh_out_row_units,
    h_row_units,
    num_rows,
    num_units,
    HAS_DH_OUT: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    KEEP_WEIGHT: tl.constexpr,
    STAGES: tl.constexpr,
):
    num_cols = num_units * UNIT
    cols = tl.arange(0, COLS)[None, :]
    if KEEP_WEIGHT:
        weight = _load_weight(weight_ptr, cols, num_cols, ZERO_CENTERED)
    dw = tl.zeros((ROWS, COLS), dtype=tl.float32)
    # Each program walks over the rows with a stride of all programs, and sums its share of dw.
    first = tl.program_id(0).to(tl.int64) * ROWS
    for start in tl.range(first, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        if KEEP_WEIGHT:
            rows = start + tl.arange(0, ROWS)[:, None]
            mask = (rows < num_rows) & (cols < num_cols)
        else:
            # A wide row is alone in its block: as a number, not a block of one, it takes no
            # register of a thread.
            rows = start
            mask = cols < num_cols
        h = tl.load(h_ptr + rows * h_row_units * UNIT + cols, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows * dy_row_units * UNIT + cols, mask=mask, other=0.0).to(
            tl.float32
        )
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        normed = h * rstd
        dw += dy * normed
        if not KEEP_WEIGHT:
            if STAGES == 1:
                weight = _load_weight(weight_ptr, cols, num_cols, ZERO_CENTERED)
            else:
                # Under a condition, which always holds, it is not copied ahead as the rows are:
                # it stays in the L1 cache, and shared memory is left to them.
                weight = tl.zeros((1, COLS), dtype=tl.float32)
                if start >= 0:
                    weight = _load_weight(weight_ptr, cols, num_cols, ZERO_CENTERED)
        g = dy * weight
        dx = (g - normed * (tl.sum(g * normed, axis=1, keep_dims=True) / num_cols)) * rstd
        if HAS_DH_OUT:
            dh_out_ptrs = dh_out_ptr + rows * dh_out_row_units * UNIT + cols
            dx += tl.load(dh_out_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + rows * num_cols + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    total = tl.sum(dw, axis=0, keep_dims=True)
    tl.store(
        partial_dw_ptr + tl.program_id(0).to(tl.int64) * num_cols + cols,
        total,
        mask=cols < num_cols,
    )


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


@cache
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
    shape: torch.Size, itemsize: int, strides: tuple[int, int], eps: float, **constants: bool
) -> Prepared:
    """The launch for x of a shape, with strides of the rows of x and the residual."""
    num_rows, hidden = math.prod(shape[:-1]), shape[-1]
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


@operator("nanotron_fast::rms_norm_forward")
def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, zero_centered: bool
) -> list[Tensor]:
    """y and, with a residual, h (..., hidden) in x's dtype; and rstd (rows,) fp32."""
    shape, y = x.shape, empty_rows(x)
    h = None if residual is None else empty_rows(x)
    rstd = x.new_empty(math.prod(shape[:-1]), dtype=torch.float32)
    x, x_stride = with_stride(x)
    residual, residual_stride = (None, 0) if residual is None else with_stride(residual)
    prepared = _prepared_forward(
        shape,
        x.element_size(),
        (x_stride, residual_stride),
        eps,
        HAS_RESIDUAL=h is not None,
        ZERO_CENTERED=zero_centered,
    )
    prepared.launch(_forward_kernel, x, residual, weight, y, h, rstd)
    return [y, rstd] if h is None else [y, h, rstd]


@_forward.register_fake
def _(x, residual, weight, eps, zero_centered):
    outs = [x.new_empty(x.shape) for each in (x, residual) if each is not None]
    return [*outs, x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)]


@operator("nanotron_fast::rms_norm_backward")
def _backward(
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
    cols = next_power_of_2(hidden)
    blocks = _BackwardBlocks.chosen(cols=cols, itemsize=h.element_size())
    # The kernel takes a wide row as a number: it is alone in its block.
    rows, num_warps = blocks.rows if cols <= _MAX_KEPT else 1, blocks.num_warps
    block_bytes = (2 if dh_out is None else 3) * rows * cols * h.element_size()
    tensors = (dy, dh_out, h, weight, rstd, dx)
    strides = (dy.stride(0), 0 if dh_out is None else dh_out.stride(0), h.stride(0))
    unit = unit_of(*strides, hidden)
    numbers = (*(stride // unit for stride in strides), num_rows, hidden // unit)
    stages = _stages(block_bytes, cols, unit * h.element_size(), h.device)
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
        _backward_kernel, (*tensors, torch.float32, *numbers), constants, h.device
    )
    num_programs = min(ceil_div(num_rows, rows), resident)
    partial_dw = torch.empty(num_programs, hidden, dtype=torch.float32, device=h.device)
    on_grid(_backward_kernel, (num_programs,))(*tensors, partial_dw, *numbers, **constants)
    return dx, partial_dw.sum(0).to(weight.dtype)


@_backward.register_fake
def _(dy, dh_out, h, weight, rstd, zero_centered):
    return h.new_empty(h.shape), weight.new_empty(weight.shape)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, zero_centered):
        y, *h, rstd = _forward(x, residual, weight, eps, zero_centered)
        ctx.save_for_backward(*(h or (x,)), weight, rstd)
        ctx.zero_centered = zero_centered
        ctx.set_materialize_grads(False)
        return (y, *h) if h else y

    @staticmethod
    def backward(ctx, dy, dh_out=None):
        h, weight, rstd = ctx.saved_tensors
        if dy is None:
            return dh_out, dh_out, None, None, None
        dx, dw = _backward(dy, dh_out, h, weight, rstd, ctx.zero_centered)
        return dx, dx if ctx.needs_input_grad[1] else None, dw, None, None


class _RmsNormOfCpu(torch.autograd.Function):
    """By the formulas above, in half the passes that autograd makes of the reference."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps, zero_centered):
        h = x if residual is None else x + residual
        wide = torch.promote_types(x.dtype, torch.float32)
        values = h.to(wide)
        rstd = values.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        y = (values * rstd).mul_(_factor(weight, wide, zero_centered)).to(x.dtype)
        ctx.save_for_backward(h, weight, rstd)
        ctx.zero_centered = zero_centered
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, h)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh_out=None):
        if dy is None:
            return dh_out, dh_out, None, None, None
        h, weight, rstd = ctx.saved_tensors
        wide, hidden = rstd.dtype, h.shape[-1]
        normed, dy = h.to(wide) * rstd, dy.to(wide)
        factor = _factor(weight, wide, ctx.zero_centered)
        products = dy * normed
        dw = products.reshape(-1, hidden).sum(0).to(weight.dtype)
        mean = (products @ factor).div_(hidden).unsqueeze(-1)
        dx = (dy * factor).sub_(normed.mul_(mean)).mul_(rstd)
        if dh_out is not None:
            dx.add_(dh_out)
        dx = dx.to(h.dtype)
        return dx, dx if ctx.needs_input_grad[1] else None, dw, None, None


def _factor(weight: Tensor, wide: torch.dtype, zero_centered: bool) -> Tensor:
    return weight.to(wide) + 1 if zero_centered else weight.to(wide)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    zero_centered: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm (Zhang and Sennrich, 2019), of the sum of x and the residual where one is given.

    Args:
        x: (..., hidden), bf16, fp16 or fp32.
        weight: (hidden,), any of them.
        eps: added to the mean square.
        residual: x's shape and dtype.
        zero_centered: the weight is stored less one, as Gemma does.

    Returns:
        y (..., hidden) in x's dtype, or (y, x + residual).

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight {tuple(weight.shape)} for x {tuple(x.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"rms_norm: residual {tuple(residual.shape)} {residual.dtype} "
            f"for x {tuple(x.shape)} {x.dtype}"
        )
    if not uses_triton(x) or x.shape[-1] > _MAX_HIDDEN or x.dtype == torch.float64:
        if torch.compiler.is_compiling() or x.is_cuda:
            return rms_norm_reference(x, weight, eps, residual, zero_centered)
        return _RmsNormOfCpu.apply(x, residual, weight, eps, zero_centered)
    return _RmsNorm.apply(x, residual, weight.contiguous(), float(eps), zero_centered)
