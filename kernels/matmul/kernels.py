"""The kernels under `matmul`: x W^T, with the GLU or the rotary embedding before the one rounding.

Both epilogues need two columns of the product at once: gate and up, or the two members of a rotary
pair. So a tile's rows of W are taken in such an order that the two are neighbours: the rows are
gathered by number, and with 128 bytes or more of each in a step, any order reads whole lines. The
tile then has one accumulator and one product as wide as the hardware takes, and its columns come
apart in registers, because a thread already holds neighbours.

Programs go over the tiles in groups of rows, so that the blocks of x and W that they share stay in
the L2 cache. The tuner picks the tile for every shape from a few that do not spill, where no sweep
has measured it on such a GPU before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from nanotron_fast.kernels.glu import activate
from nanotron_fast.kernels.runtime import capture
from nanotron_fast.kernels.runtime.backend import is_interpreting
from nanotron_fast.kernels.runtime.tuning import Tuned, powers_of_2

# How many rows of blocks have programs that run side by side.
GROUP = 8
# The largest BLOCK_K: the kernels leave out a mask where it divides the depth of the product.
MAX_BLOCK_K = 64


def _config(block_m: int, block_n: int, block_k: int, stages: int, warps: int) -> triton.Config:
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return triton.Config(blocks, num_stages=stages, num_warps=warps)


_HALF_CONFIGS = [
    _config(128, 256, 64, 3, 8),
    _config(128, 256, 64, 4, 8),
    _config(128, 128, 64, 3, 8),
    _config(64, 256, 64, 4, 8),
    _config(64, 128, 64, 4, 4),
]
# For fp32, which in full precision has no tensor cores, and for rows that no step divides, which
# are read element by element: neither is the shape of a training step.
_SLOW_CONFIGS = [_config(64, 64, 16, 2, 8)]
_INTERPRETED_CONFIGS = [_config(32, 64, 32, 1, 4)]
_CONFIGS = _INTERPRETED_CONFIGS if is_interpreting() else [*_HALF_CONFIGS, *_SLOW_CONFIGS]


@dataclass(frozen=True)
class GluBlocks(
    Tuned,
    operation="matmul_glu",
    block_m=powers_of_2(16, 256),
    block_n=powers_of_2(16, 256),
    block_k=powers_of_2(16, MAX_BLOCK_K),
):
    """What of a configuration is tuned."""

    block_m: int
    block_n: int
    block_k: int
    num_stages: int
    num_warps: int

    @classmethod
    def rule(cls, tokens_bucket: int, num_cols: int, num_k: int, itemsize: int) -> None:
        """There is none: where nothing was measured, Triton's tuner times the lists above."""

    @classmethod
    def of(cls, config: triton.Config) -> GluBlocks:
        blocks = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        return cls(*blocks, config.num_stages, config.num_warps)

    def constants(self) -> dict[str, int]:
        sizes = (self.block_m, self.block_n, self.block_k, self.num_stages, self.num_warps)
        return _config(*sizes).all_kwargs()


class RopeBlocks(GluBlocks, operation="matmul_rope"):
    """The same before the rotary embedding."""


def _prune(configs: list[triton.Config], args: dict[str, Any], **rest: Any) -> list[triton.Config]:
    """The configurations worth timing for this dtype and so many tokens, on this device."""
    x = args["x_ptr"]
    # Asked for where this shape is new, to be timed.
    capture.refuse_if_capturing(x.device, "a fused product of a shape whose blocks are not chosen")
    if x.dtype == torch.float32 or not rest["EVEN_K"]:
        return _SLOW_CONFIGS
    budget = 1 << 30
    if x.is_cuda:
        properties = torch.cuda.get_device_properties(x.device)
        budget = getattr(properties, "shared_memory_per_block_optin", budget)

    def fits(config: triton.Config) -> bool:
        sizes = config.kwargs
        step = (sizes["BLOCK_M"] + sizes["BLOCK_N"]) * sizes["BLOCK_K"] * x.element_size()
        is_short = sizes["BLOCK_M"] <= max(64, args["tokens_bucket"])
        return is_short and config.num_stages * step <= budget

    return [config for config in _HALF_CONFIGS if fits(config)]


def _autotune(kernel):
    key = ["tokens_bucket", "num_cols", "num_k"]
    pruning = {"early_config_prune": _prune}
    # In Triton's cache, where the next process finds it.
    return triton.autotune(_CONFIGS, key, prune_configs_by=pruning, cache_results=True)(kernel)


@triton.jit
def _tile(num_rows, num_pairs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and first pair of columns of this program's tile, in grouped order."""
    num_row_blocks = tl.cdiv(num_rows, BLOCK_M)
    num_pair_blocks = tl.cdiv(num_pairs, BLOCK_N // 2)
    programs_per_group = GROUP * num_pair_blocks
    group = tl.program_id(0) // programs_per_group
    within = tl.program_id(0) % programs_per_group
    rows_of_group = tl.minimum(num_row_blocks - group * GROUP, GROUP)
    row_block = group * GROUP + within % rows_of_group
    return row_block * BLOCK_M, (within // rows_of_group) * (BLOCK_N // 2)


@triton.jit
def _product(
    x_ptr,
    w_ptr,
    first_row,
    w_rows,
    x_row_stride,
    w_row_stride,
    num_rows,
    num_k,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile x[first_row:] @ w[w_rows]^T in fp32.

    Rows past the end are read from the last one and never stored: masks would cost registers in
    the loop. So would 64-bit offsets, so that only a WIDE matrix of 2^31 elements has them.
    """
    if WIDE:
        w_rows = w_rows.to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    rows = tl.minimum(tl.arange(0, BLOCK_M), num_rows - 1 - first_row)
    x_ptr += first_row.to(tl.int64) * x_row_stride
    x_offsets = rows[:, None] * x_row_stride + ks[None, :]
    w_offsets = w_rows[None, :] * w_row_stride + ks[:, None]
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, num_k, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptr + x_offsets)
            w = tl.load(w_ptr + w_offsets)
        else:
            inside = ks < num_k - k
            x = tl.load(x_ptr + x_offsets, mask=inside[None, :], other=0.0)
            w = tl.load(w_ptr + w_offsets, mask=inside[:, None], other=0.0)
        product = tl.dot(x, w, product, input_precision="ieee")
        x_ptr += BLOCK_K
        w_ptr += BLOCK_K
    return product


@triton.jit
def _halves(product, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile: taken in turn, they need half the registers."""
    return tl.split(tl.permute(tl.reshape(product, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _finish_glu(
    product,
    h_ptr,
    gate_up_ptr,
    first_row,
    first_col,
    num_rows,
    num_cols,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """Stores h, and gate_up where it is wanted; the product's columns are gate, up, gate, up ..."""
    gate, up = tl.split(tl.reshape(product, (ROWS, MEMBERS // 2, 2)))
    rows = (first_row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols = first_col + tl.arange(0, MEMBERS // 2)[None, :]
    mask = (rows < num_rows) & (cols < num_cols)
    dtype = h_ptr.dtype.element_ty
    if gate_up_ptr is not None:
        gate_ptrs = gate_up_ptr + rows * (2 * num_cols) + cols
        tl.store(gate_ptrs, gate.to(dtype), mask=mask)
        tl.store(gate_ptrs + num_cols, up.to(dtype), mask=mask)
    h = activate(gate, ACTIVATION)[0] * up
    tl.store(h_ptr + rows * num_cols + cols, h.to(dtype), mask=mask)


@_autotune
@triton.jit
def glu_kernel(
    x_ptr,
    w_ptr,
    h_ptr,
    gate_up_ptr,
    x_row_stride,
    w_row_stride,
    num_rows,
    num_cols,
    num_k,
    tokens_bucket,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h (rows, cols) = act(x Wg^T) * (x Wu^T), and gate_up (rows, 2 * cols) where it is wanted."""
    first_row, first_col = _tile(num_rows, num_cols, BLOCK_M, BLOCK_N, GROUP)
    members = tl.arange(0, BLOCK_N)
    w_cols = tl.minimum(first_col + members // 2, num_cols - 1)
    # fmt: off
    product = _product(
        x_ptr, w_ptr, first_row, w_cols + (members % 2) * num_cols,
        x_row_stride, w_row_stride, num_rows, num_k, EVEN_K, WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
    )
    # fmt: on
    left, right = _halves(product, BLOCK_M, BLOCK_N)
    # fmt: off
    _finish_glu(
        left, h_ptr, gate_up_ptr, first_row, first_col, num_rows, num_cols,
        ACTIVATION, BLOCK_M, BLOCK_N // 2,
    )
    _finish_glu(
        right, h_ptr, gate_up_ptr, first_row, first_col + BLOCK_N // 4, num_rows, num_cols,
        ACTIVATION, BLOCK_M, BLOCK_N // 2,
    )
    # fmt: on


@triton.jit
def _column(pair, member, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The column of a member, 0 or 1, of a pair; what does not turn is paired off the same way."""
    if INTERLEAVED:
        return 2 * pair + member
    head = pair // (HEAD_DIM // 2)
    index = pair % (HEAD_DIM // 2)
    if 2 * HALF == HEAD_DIM:
        return head * HEAD_DIM + index + member * HALF
    turning = index + member * HALF
    resting = HALF + index + member * (HEAD_DIM // 2 - HALF)
    return head * HEAD_DIM + tl.where(index < HALF, turning, resting)


@triton.jit
def _finish_rope(
    product,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    qkv_ptr,
    first_row,
    first_pair,
    num_rows,
    num_cols,
    num_turning_heads,
    num_positions,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """Stores a product whose columns are the members of pairs, with the bias and turned."""
    a, b = tl.split(tl.reshape(product, (ROWS, MEMBERS // 2, 2)))
    rows = (first_row + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    pairs = first_pair + tl.arange(0, MEMBERS // 2)[None, :]
    cols_a = _column(pairs, 0, HEAD_DIM, HALF, INTERLEAVED)
    cols_b = _column(pairs, 1, HEAD_DIM, HALF, INTERLEAVED)
    # So the compiler sees that neighbours are inside together, and makes one access of eight.
    inside = pairs < num_cols // 2
    if bias_ptr is not None:
        a += tl.load(bias_ptr + cols_a, mask=inside, other=0.0).to(tl.float32)
        b += tl.load(bias_ptr + cols_b, mask=inside, other=0.0).to(tl.float32)
    positions = rows
    if position_ids_ptr is not None:
        positions = tl.load(position_ids_ptr + rows, mask=rows < num_rows, other=0).to(tl.int64)
    index = pairs % (HEAD_DIM // 2)
    turns = (pairs // (HEAD_DIM // 2) < num_turning_heads) & (index < HALF)
    in_table = (rows < num_rows) & (positions >= 0) & (positions < num_positions)
    table = positions * HALF + index
    # A position outside the tables makes NaN, not a read outside them.
    cos = tl.load(cos_ptr + table, mask=in_table & turns, other=float("nan"))
    sin = tl.load(sin_ptr + table, mask=in_table & turns, other=float("nan"))
    cos = tl.where(turns, cos, 1.0)
    sin = tl.where(turns, sin, 0.0)
    dtype = qkv_ptr.dtype.element_ty
    turned_a = (a * cos - b * sin).to(dtype)
    turned_b = (b * cos + a * sin).to(dtype)
    out_ptrs = qkv_ptr + rows * num_cols
    if INTERLEAVED:
        turned = tl.reshape(tl.join(turned_a, turned_b), (ROWS, MEMBERS))
        cols = 2 * first_pair + tl.arange(0, MEMBERS)[None, :]
        tl.store(out_ptrs + cols, turned, mask=(rows < num_rows) & (cols < num_cols))
    else:
        mask = (rows < num_rows) & inside
        tl.store(out_ptrs + cols_a, turned_a, mask=mask)
        tl.store(out_ptrs + cols_b, turned_b, mask=mask)


@_autotune
@triton.jit
def rope_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    position_ids_ptr,
    qkv_ptr,
    x_row_stride,
    w_row_stride,
    num_rows,
    num_cols,
    num_k,
    num_turning_heads,
    num_positions,
    tokens_bucket,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """qkv (rows, cols) = x W^T + bias, with the first heads turned."""
    first_row, first_pair = _tile(num_rows, num_cols // 2, BLOCK_M, BLOCK_N, GROUP)
    members = tl.arange(0, BLOCK_N)
    w_pairs = tl.minimum(first_pair + members // 2, num_cols // 2 - 1)
    w_rows = _column(w_pairs, members % 2, HEAD_DIM, HALF, INTERLEAVED)
    # fmt: off
    product = _product(
        x_ptr, w_ptr, first_row, w_rows, x_row_stride, w_row_stride,
        num_rows, num_k, EVEN_K, WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
    )
    # fmt: on
    left, right = _halves(product, BLOCK_M, BLOCK_N)
    # fmt: off
    _finish_rope(
        left, bias_ptr, cos_ptr, sin_ptr, position_ids_ptr, qkv_ptr, first_row, first_pair,
        num_rows, num_cols, num_turning_heads, num_positions,
        HEAD_DIM, HALF, INTERLEAVED, BLOCK_M, BLOCK_N // 2,
    )
    _finish_rope(
        right, bias_ptr, cos_ptr, sin_ptr, position_ids_ptr, qkv_ptr, first_row,
        first_pair + BLOCK_N // 4, num_rows, num_cols, num_turning_heads, num_positions,
        HEAD_DIM, HALF, INTERLEAVED, BLOCK_M, BLOCK_N // 2,
    )
    # fmt: on
