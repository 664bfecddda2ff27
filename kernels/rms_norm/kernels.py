"""The kernels under `rms_norm`.

A row is in registers as a whole, and its share of dw with it. In backward one of more than 8192
columns takes all registers of a multiprocessor, so the next row of two-byte elements is copied to
shared memory meanwhile: 128 KB for two rows, 192 KB with the residual; where there is less (sm_80
has 163 KB) it is read when its turn comes, and so is one of four-byte elements, two of which take
256 KB. Programs of a part of the columns each would need the means of g * n first, as those of rows
in parts do (part_kernels.py): h and dy would be read twice, 10 bytes an element, 12 with the
residual; 20 for 12 and 24 for 16 of four-byte elements.
Accesses are as wide as suits all rows: 16 bytes where hidden is a multiple of 8. Within each row of
an odd hidden there are aligned vectors too, but they begin at other columns in every row, so that
neither the weight nor the sums of dw could stay with a thread. Columns are said to be multiples of
UNIT and no more: for the weight and dw, which begin at an aligned address, an access would have
another layout than for the rows, and each row take a way through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_weight(weight_ptr, cols, num_cols, ZERO_CENTERED: tl.constexpr):
    weight = tl.load(weight_ptr + cols, mask=cols < num_cols, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        weight += 1.0
    return weight


@triton.jit
def forward_kernel(
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
    cols = tl.multiple_of(tl.arange(0, COLS), UNIT)[None, :]
    mask = (rows < num_rows) & (cols < num_cols)
    h = tl.load(x_ptr + rows * x_row_units * UNIT + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(
            residual_ptr + rows * residual_row_units * UNIT + cols, mask=mask, other=0.0
        ).to(tl.float32)
        rounded = (h + residual).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + rows * num_cols + cols, rounded, mask=mask)
        h = rounded.to(tl.float32)
    weight = load_weight(weight_ptr, cols, num_cols, ZERO_CENTERED)
    rstd = 1.0 / tl.sqrt(tl.sum(h * h, axis=1, keep_dims=True) / num_cols + eps)
    y = h * rstd * weight
    tl.store(y_ptr + rows * num_cols + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit
def backward_kernel(
    dy_ptr,
    dh_out_ptr,
    h_ptr,
    weight_ptr,
    rstd_ptr,
    means_ptr,
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
    cols = tl.multiple_of(tl.arange(0, COLS), UNIT)[None, :]
    if means_ptr is not None:
        # The program has a part of a row that is in parts.
        cols += tl.program_id(1) * COLS
    if KEEP_WEIGHT:
        weight = load_weight(weight_ptr, cols, num_cols, ZERO_CENTERED)
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
                weight = load_weight(weight_ptr, cols, num_cols, ZERO_CENTERED)
            else:
                # Under a condition, which always holds, it is not copied ahead as the rows are:
                # it stays in the L1 cache, and shared memory is left to them.
                weight = tl.zeros((1, COLS), dtype=tl.float32)
                if start >= 0:
                    weight = load_weight(weight_ptr, cols, num_cols, ZERO_CENTERED)
        g = dy * weight
        if means_ptr is not None:
            mean = tl.load(means_ptr + rows, mask=rows < num_rows, other=0.0)
        else:
            mean = tl.sum(g * normed, axis=1, keep_dims=True) / num_cols
        dx = (g - normed * mean) * rstd
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
