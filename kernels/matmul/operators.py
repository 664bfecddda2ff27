"""Both products as operators, each around one launch; shapes as in `matmul`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from nanotron_fast.kernels.matmul.choice import tokens_bucket
from nanotron_fast.kernels.matmul.kernels import (
    GROUP,
    MAX_BLOCK_K,
    GluBlocks,
    RopeBlocks,
    glu_kernel,
    rope_kernel,
)
from nanotron_fast.kernels.runtime.launch import on_grid
from nanotron_fast.kernels.runtime.operators import operator
from nanotron_fast.kernels.runtime.sizes import ceil_div


def _grid(num_rows: int, num_pairs: int):
    def size(constants: dict[str, int]) -> tuple[int]:
        row_blocks = ceil_div(num_rows, constants["BLOCK_M"])
        return (row_blocks * ceil_div(num_pairs, constants["BLOCK_N"] // 2),)

    return size


def _launch(
    kernel: Any, kind: type[GluBlocks], x: Tensor, num_cols: int, num_pairs: int
) -> Callable[..., None]:
    """A function of the kernel's arguments: with the blocks that were measured, or the tuner's."""
    grid, (num_rows, num_k) = _grid(x.shape[0], num_pairs), x.shape
    blocks = kind.chosen(
        tokens_bucket=tokens_bucket(num_rows),
        num_cols=num_cols,
        num_k=num_k,
        itemsize=x.element_size(),
    )
    if blocks is None:
        return on_grid(kernel, grid)
    return partial(on_grid(kernel.fn, grid), **blocks.constants())


def _is_wide(weight: Tensor) -> bool:
    """Whether offsets into it need more than 32 bits."""
    return weight.shape[0] * weight.stride(0) >= 2**31


@operator("nanotron_fast::matmul_glu")
def glu_product(
    x: Tensor, gate_up_weight: Tensor, activation: str, save_gate_up: bool
) -> tuple[Tensor, Tensor]:
    """h and gate_up, which is empty where it is not asked for."""
    (num_rows, hidden), num_cols = x.shape, gate_up_weight.shape[0] // 2
    h = x.new_empty(num_rows, num_cols)
    gate_up = x.new_empty((num_rows, 2 * num_cols) if save_gate_up else (0,))
    if h.numel():
        _launch(glu_kernel, GluBlocks, x, num_cols, num_cols)(
            x,
            gate_up_weight,
            h,
            gate_up if save_gate_up else None,
            x.stride(0),
            gate_up_weight.stride(0),
            num_rows,
            num_cols,
            hidden,
            tokens_bucket(num_rows),
            ACTIVATION=activation,
            EVEN_K=hidden % MAX_BLOCK_K == 0,
            WIDE=_is_wide(gate_up_weight),
            GROUP=GROUP,
        )
    return h, gate_up


@glu_product.register_fake
def _(x, gate_up_weight, activation, save_gate_up):
    shape = (x.shape[0], gate_up_weight.shape[0])
    return x.new_empty(shape[0], shape[1] // 2), x.new_empty(shape if save_gate_up else (0,))


@operator("nanotron_fast::matmul_rope")
def rope_product(
    x: Tensor,
    qkv_weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    position_ids: Tensor | None,
    interleaved: bool,
) -> Tensor:
    """qkv; bias, tables and positions are contiguous."""
    (num_rows, hidden), num_cols = x.shape, qkv_weight.shape[0]
    qkv = x.new_empty(num_rows, num_cols)
    if qkv.numel():
        _launch(rope_kernel, RopeBlocks, x, num_cols, num_cols // 2)(
            x,
            qkv_weight,
            bias,
            cos,
            sin,
            position_ids,
            qkv,
            x.stride(0),
            qkv_weight.stride(0),
            num_rows,
            num_cols,
            hidden,
            num_q_heads + num_kv_heads,
            cos.shape[0],
            tokens_bucket(num_rows),
            HEAD_DIM=head_dim,
            HALF=cos.shape[1],
            INTERLEAVED=interleaved,
            EVEN_K=hidden % MAX_BLOCK_K == 0,
            WIDE=_is_wide(qkv_weight),
            GROUP=GROUP,
        )
    return qkv


@rope_product.register_fake
def _(
    x, qkv_weight, bias, cos, sin, num_q_heads, num_kv_heads, head_dim, position_ids, interleaved
):
    return x.new_empty(x.shape[0], qkv_weight.shape[0])
