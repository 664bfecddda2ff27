"""The kernels under `rms_norm` for rows of more than 16384 columns, which are taken in parts.

Such a row does not fit in the registers of a multiprocessor. In forward a program goes through the
parts of its row twice, the second time from a cache: it has 1024 threads, so that two are on a
multiprocessor, and all rows of 65536 two-byte elements that are on their way take 35 MB of an
H100's 50 MB of L2 cache. So memory moves what it does for narrower rows: 4 bytes an element, 8 with
the residual.

In backward the sums of dw for a row as a whole would have to lie in memory, and take 8 bytes an
element for every row. So the means of g * n come first, with a program for each row, and then
`backward_kernel`, whose programs walk over the rows of one part each, and keep its weight and its
sums of dw in registers. h and dy are read by both: 10 bytes an element, 12 with the residual.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nanotron_fast.kernels.rms_norm.kernels import load_weight


@triton.jit
def forward_by_parts_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    h_ptr,
    rstd_ptr,
    x_row_units,
    residual_row_units,
    num_units,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    UNIT: tl.constexpr,
    COLS: tl.constexpr,
):
    num_cols = num_units * UNIT
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * x_row_units * UNIT
    h_row = x_row
    if HAS_RESIDUAL:
        residual_row = residual_ptr + row * residual_row_units * UNIT
        h_row = h_ptr + row * num_cols
    squares = tl.zeros((COLS,), dtype=tl.float32)
    for start in tl.range(0, num_cols, COLS):
        cols = start + tl.multiple_of(tl.arange(0, COLS), UNIT)
        mask = cols < num_cols
        if HAS_RESIDUAL:
            # What is not read again leaves the caches to h.
            x = tl.load(x_row + cols, mask=mask, other=0.0, eviction_policy="evict_first")
            residual = tl.load(
                residual_row + cols, mask=mask, other=0.0, eviction_policy="evict_first"
            )
            h = (x.to(tl.float32) + residual.to(tl.float32)).to(h_ptr.dtype.element_ty)
            tl.store(h_row + cols, h, mask=mask)
        else:
            h = tl.load(x_row + cols, mask=mask, other=0.0)
        squares += h.to(tl.float32) * h.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / num_cols + eps)
    tl.store(rstd_ptr + row, rstd)
    if HAS_RESIDUAL:
        # Other threads of this program may read what one has stored.
        tl.debug_barrier()
    # From the last part to the first: what was read last is the likeliest to be in a cache.
    last = (num_cols - 1) // COLS * COLS
    for start in tl.range(0, num_cols, COLS):
        cols = last - start + tl.multiple_of(tl.arange(0, COLS), UNIT)
        mask = cols < num_cols
        h = tl.load(h_row + cols, mask=mask, other=0.0, eviction_policy="evict_first")
        weight = load_weight(weight_ptr, cols, num_cols, ZERO_CENTERED)
        y = h.to(tl.float32) * rstd * weight
        tl.store(y_ptr + row * num_cols + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def means_kernel(
    dy_ptr,
    h_ptr,
    weight_ptr,
    rstd_ptr,
    means_ptr,
    dy_row_units,
    h_row_units,
    num_units,
    ZERO_CENTERED: tl.constexpr,
    UNIT: tl.constexpr,
    COLS: tl.constexpr,
):
    """mean(g * n) of each row."""
    num_cols = num_units * UNIT
    row = tl.program_id(0).to(tl.int64)
    products = tl.zeros((COLS,), dtype=tl.float32)
    for start in tl.range(0, num_cols, COLS):
        cols = start + tl.multiple_of(tl.arange(0, COLS), UNIT)
        mask = cols < num_cols
        h = tl.load(h_ptr + row * h_row_units * UNIT + cols, mask=mask, other=0.0)
        dy = tl.load(dy_ptr + row * dy_row_units * UNIT + cols, mask=mask, other=0.0)
        weight = load_weight(weight_ptr, cols, num_cols, ZERO_CENTERED)
        products += dy.to(tl.float32) * weight * h.to(tl.float32)
    mean = tl.sum(products, axis=0) * tl.load(rstd_ptr + row) / num_cols
    tl.store(means_ptr + row, mean)
