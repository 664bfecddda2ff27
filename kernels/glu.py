"""Gated linear units on the packed product of an MLP's first layer: SwiGLU and GeGLU.

    h = act(gate) * up                                   with [gate | up] = gate_up

    silu         act(x) = x * sigmoid(x)
    gelu         act(x) = x * (1 + erf(x / sqrt(2))) / 2
    gelu_tanh    act(x) = x * (1 + tanh(u)) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3)

All of it in fp32 and rounded once. Backward computes act again from the input:

    d_gate = dy * up * act'(gate)        d_up = dy * act(gate)

Bytes for (rows, inter) of two-byte elements: forward 6 a pair of gate and up, backward 10, and 12
where backward gives h again for the weight gradient of the product that follows. Saved for
backward: the input and nothing else.
Shapes: gate_up, d_gate_up (..., 2 * inter) as [gate | up]; h, dy (..., inter).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanotron_fast.kernels.runtime.backend import uses_triton
from nanotron_fast.kernels.runtime.launch import Prepared
from nanotron_fast.kernels.runtime.operators import operator
from nanotron_fast.kernels.runtime.rows import empty_rows, with_stride
from nanotron_fast.kernels.runtime.sizes import ceil_div, next_power_of_2, unit_of
from nanotron_fast.kernels.runtime.tuning import Tuned, remembered

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def _activate_reference(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="none" if activation == "gelu" else "tanh")


def _slope(factor: Tensor, gate: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """factor * act'(gate), by torch's own backward passes; into `out` where that is given."""
    operators, options = torch.ops.aten.silu_backward, {}
    if activation != "silu":
        operators = torch.ops.aten.gelu_backward
        options["approximate"] = "none" if activation == "gelu" else "tanh"
        # Past 30 the slope is 0 or 1 to the last bit, and torch's tanh would overflow further out.
        gate = gate.clamp(-30, 30)
    if out is None:
        return operators(factor, gate, **options)
    return operators.grad_input(factor, gate, **options, grad_input=out)


def glu_reference(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """The same in plain torch, at least in fp32; what CPU tensors take."""
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(wide).chunk(2, -1)
    return (_activate_reference(gate, activation) * up).to(gate_up.dtype)


def glu_backward_reference(
    dy: Tensor, gate_up: Tensor, activation: str = "silu", with_output: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """d_gate_up, or (d_gate_up, h), in plain torch, in few passes over memory."""
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(wide).chunk(2, -1)
    activated, dh = _activate_reference(gate, activation), dy.to(wide)
    if torch.compiler.is_compiling():  # an out= that is not contiguous is refused in a backward
        halves = (_slope(dh * up, gate, activation), dh * activated)
        d_gate_up = torch.cat(halves, -1)
    else:
        d_gate_up = torch.empty_like(gate_up, dtype=wide, memory_format=torch.contiguous_format)
        d_gate, d_up = d_gate_up.chunk(2, -1)
        torch.mul(dh, activated, out=d_up)
        _slope(dh * up, gate, activation, out=d_gate)
    d_gate_up = d_gate_up.to(gate_up.dtype)
    return (d_gate_up, activated.mul_(up).to(gate_up.dtype)) if with_output else d_gate_up


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """act(gate) and act'(gate), both fp32. What the caller does not use is not computed."""
    if ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
        density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        return gate * cdf, cdf + gate * density
    if ACTIVATION == "silu":
        inner, inner_slope = gate, 1.0
    else:
        # Past 30 the sigmoid is 0 or 1 to the last bit, and the square could still overflow.
        near = tl.minimum(tl.maximum(gate, -30.0), 30.0)
        inner = 1.5957691216057308 * near * (1.0 + 0.044715 * near * near)
        inner_slope = 1.5957691216057308 * (1.0 + 0.134145 * near * near)
    sigmoid = 1.0 / (1.0 + tl.exp(-inner))
    return gate * sigmoid, sigmoid + gate * sigmoid * (1.0 - sigmoid) * inner_slope


@triton.jit
def _offsets(num_rows, num_cols, UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows, columns and mask of this program's block; neighbours lie side by side in a row.

    Columns are said to be multiples of UNIT and no more: rows of d_gate_up begin at twice UNIT, for
    which a store would have another layout than the loads, and take a way through shared memory.
    """
    num_col_blocks = tl.cdiv(num_cols, COLS)
    row_block = (tl.program_id(0) // num_col_blocks).to(tl.int64)
    col_block = tl.program_id(0) % num_col_blocks
    rows = row_block * ROWS + tl.arange(0, ROWS)[:, None]
    cols = col_block * COLS + tl.multiple_of(tl.arange(0, COLS), UNIT)[None, :]
    return rows, cols, (rows < num_rows) & (cols < num_cols)


@triton.jit
def _forward_kernel(
    gate_up_ptr,
    h_ptr,
    gate_up_row_units,
    num_rows,
    num_units,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    num_cols = num_units * UNIT
    rows, cols, mask = _offsets(num_rows, num_cols, UNIT, ROWS, COLS)
    gate_ptrs = gate_up_ptr + rows * gate_up_row_units * UNIT + cols
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + num_cols, mask=mask, other=0.0).to(tl.float32)
    h = activate(gate, ACTIVATION)[0] * up
    tl.store(h_ptr + rows * num_cols + cols, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,
    gate_up_ptr,
    d_gate_up_ptr,
    h_ptr,
    dy_row_units,
    gate_up_row_units,
    num_rows,
    num_units,
    HAS_H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    num_cols = num_units * UNIT
    rows, cols, mask = _offsets(num_rows, num_cols, UNIT, ROWS, COLS)
    gate_ptrs = gate_up_ptr + rows * gate_up_row_units * UNIT + cols
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + num_cols, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + rows * dy_row_units * UNIT + cols, mask=mask, other=0.0).to(tl.float32)
    activated, slope = activate(gate, ACTIVATION)
    dtype: tl.constexpr = d_gate_up_ptr.dtype.element_ty
    d_gate_ptrs = d_gate_up_ptr + rows * (2 * num_cols) + cols
    tl.store(d_gate_ptrs, (dy * up * slope).to(dtype), mask=mask)
    tl.store(d_gate_ptrs + num_cols, (dy * activated).to(dtype), mask=mask)
    if HAS_H:
        tl.store(h_ptr + rows * num_cols + cols, (activated * up).to(dtype), mask=mask)


@dataclass(frozen=True)
class _ForwardBlocks(Tuned, operation="glu_forward"):
    """`elements` of h to a program: a part of a row, or up to 16 short rows."""

    elements: int
    num_warps: int

    @classmethod
    def rule(cls, cols: int, itemsize: int) -> _ForwardBlocks:
        # Eight elements a thread, so one 16-byte access of each operand. Where inter is odd gate,
        # up and h begin at three distances from an aligned address, in every row at others, and
        # vectors that are aligned for one of them are not for the others: there an access is of one
        # element, so that a thread makes 16 loads and 8 stores in forward for 2 and 1. A warp's
        # lanes still lie side by side: what grows is the number of instructions, not of bytes. Of
        # 8 elements they are 253 for 205 on sm_90, and 346 for 265 in backward, which an H100 has
        # the time for: in a cycle its memory moves 14 bytes for each multiprocessor, 2.3 elements
        # in forward and 1.4 in backward, so 2.3 and 1.9 instructions of a warp, of 4 at most.
        return cls(1024, 4)

    def candidates(self) -> list[_ForwardBlocks]:
        return [type(self)(*each) for each in ((512, 2), (2048, 4), (2048, 8), (4096, 8))]


class _BackwardBlocks(_ForwardBlocks, operation="glu_backward"):
    """The same of the gradient."""


@remembered
def _prepared(
    kind: type[Tuned],
    shape: torch.Size,
    itemsize: int,
    strides: tuple[int, ...],
    **constants: Any,
) -> Prepared:
    """The launch for h of a shape, with strides of rows. Short rows share a block."""
    num_rows, num_cols = math.prod(shape[:-1]), shape[-1]
    padded = next_power_of_2(num_cols)
    blocks = kind.chosen(cols=padded, itemsize=itemsize)
    cols = min(padded, blocks.elements)
    rows = min(16, blocks.elements // cols)
    unit = unit_of(*strides, num_cols)
    return Prepared(
        (ceil_div(num_rows, rows) * ceil_div(num_cols, cols),),
        (*[stride // unit for stride in strides], num_rows, num_cols // unit),
        **constants,
        UNIT=unit,
        ROWS=rows,
        COLS=cols,
        num_warps=blocks.num_warps,
    )


@operator("nanotron_fast::glu_forward")
def _forward(gate_up: Tensor, activation: str) -> Tensor:
    """h (..., inter) from gate_up (..., 2 * inter)."""
    *shape, both = gate_up.shape
    h = gate_up.new_empty((*shape, both // 2))
    gate_up, stride = with_stride(gate_up)
    itemsize = h.element_size()
    prepared = _prepared(_ForwardBlocks, h.shape, itemsize, (stride,), ACTIVATION=activation)
    prepared.launch(_forward_kernel, gate_up, h)
    return h


@_forward.register_fake
def _(gate_up, activation):
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@operator("nanotron_fast::glu_backward")
def _backward(
    dy: Tensor, gate_up: Tensor, activation: str, with_output: bool
) -> tuple[Tensor, Tensor]:
    """d_gate_up (..., 2 * inter) and h (..., inter), which is empty where it is not asked for."""
    d_gate_up = empty_rows(gate_up)
    h = gate_up.new_empty(dy.shape if with_output else (0,))
    shape = dy.shape
    (dy, dy_stride), (gate_up, stride) = with_stride(dy), with_stride(gate_up)
    prepared = _prepared(
        _BackwardBlocks,
        shape,
        dy.element_size(),
        (dy_stride, stride),
        HAS_H=with_output,
        ACTIVATION=activation,
    )
    prepared.launch(_backward_kernel, dy, gate_up, d_gate_up, h if with_output else None)
    return d_gate_up, h


@_backward.register_fake
def _(dy, gate_up, activation, with_output):
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(dy.shape if with_output else (0,))


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, activation):
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        return _forward(gate_up, activation)

    @staticmethod
    def backward(ctx, dy):
        (gate_up,) = ctx.saved_tensors
        return _backward(dy, gate_up, ctx.activation, False)[0], None


def _check(name: str, gate_up: Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: activation {activation!r}: choose {', '.join(ACTIVATIONS)}")
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"{name}: gate_up {tuple(gate_up.shape)} has no two equal halves")
    if not gate_up.dtype.is_floating_point:
        raise ValueError(f"{name}: gate_up is {gate_up.dtype}")


def _takes_reference(gate_up: Tensor) -> bool:
    return not uses_triton(gate_up) or gate_up.dtype == torch.float64 or gate_up.numel() == 0


def glu_forward(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """h (..., inter) without autograd, for a block that has its own backward; see `glu`."""
    _check("glu_forward", gate_up, activation)
    if _takes_reference(gate_up):
        return glu_reference(gate_up, activation)
    return _forward(gate_up, activation)


def glu_backward(
    dy: Tensor, gate_up: Tensor, activation: str = "silu", *, with_output: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The backward of `glu` by itself, for a block that has its own backward.

    Args:
        dy: (..., inter), the gradient of h.
        gate_up: (..., 2 * inter), what forward was given.
        activation: as there.
        with_output: give h too, in the same pass over memory.

    Returns:
        d_gate_up (..., 2 * inter) in gate_up's dtype, or (d_gate_up, h).

    Raises:
        ValueError: shapes do not fit, or the activation is unknown.
    """
    _check("glu_backward", gate_up, activation)
    if dy.shape != (*gate_up.shape[:-1], gate_up.shape[-1] // 2):
        raise ValueError(f"glu_backward: dy {tuple(dy.shape)} for gate_up {tuple(gate_up.shape)}")
    if _takes_reference(gate_up):
        return glu_backward_reference(dy, gate_up, activation, with_output)
    d_gate_up, h = _backward(dy, gate_up, activation, with_output)
    return (d_gate_up, h) if with_output else d_gate_up


def glu(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """act(gate) * up (Shazeer, 2020) on packed halves.

    Args:
        gate_up: (..., 2 * inter) as [gate | up], bf16, fp16 or fp32.
        activation: "silu", "gelu" (with erf) or "gelu_tanh".

    Returns:
        (..., inter) in gate_up's dtype.

    Raises:
        ValueError: the last dimension is odd, or the activation is unknown.
    """
    _check("glu", gate_up, activation)
    if _takes_reference(gate_up):
        return glu_reference(gate_up, activation)
    return _Glu.apply(gate_up, activation)
