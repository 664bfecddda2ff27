"""The gather and the sum of gradients by id as operators; `embedding` says how they fit together.

Shapes: ids (tokens,); weight, dweight (rows, hidden); dy (tokens, hidden).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanotron_fast.kernels.embedding.kernels import gather_kernel, join_kernel, sum_kernel
from nanotron_fast.kernels.runtime.backend import uses_triton
from nanotron_fast.kernels.runtime.launch import Prepared, on_grid
from nanotron_fast.kernels.runtime.operators import operator
from nanotron_fast.kernels.runtime.sizes import ceil_div, next_power_of_2, unit_of
from nanotron_fast.kernels.runtime.tuning import Tuned, powers_of_2, remembered


def _local_rows(ids: Tensor, num_rows: int, first_row: int, padding_idx: int | None) -> Tensor:
    """Rows of this rank (tokens,) int32; num_rows where an id is another rank's, or padding."""
    rows = ids.long() - first_row
    is_here = (rows >= 0) & (rows < num_rows)
    if padding_idx is not None:
        is_here &= ids != padding_idx
    return torch.where(is_here, rows, num_rows).int()


def _check_ids(ids: Tensor, vocab: int) -> None:
    if ids.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= vocab:
        wrong = low if low < 0 else high
        raise IndexError(f"vocab_parallel_embedding: id {wrong} for a vocabulary of {vocab}")


@dataclass(frozen=True)
class _GatherBlocks(Tuned, operation="embedding_gather"):
    """`elements` to a program: a part of a row, or several rows."""

    elements: int
    num_warps: int

    @classmethod
    def rule(cls, cols: int, itemsize: int) -> _GatherBlocks:
        return cls(4096, 4)

    def candidates(self) -> list[_GatherBlocks]:
        return [_GatherBlocks(*each) for each in ((2048, 4), (4096, 8), (8192, 8))]


@dataclass(frozen=True)
class _SumBlocks(
    Tuned,
    operation="embedding_sum",
    cols=powers_of_2(1, 16384),
    piece=powers_of_2(1, 4096),
    tokens=powers_of_2(1, 64),
):
    """A program sums up to `piece` sorted tokens, `tokens` at a time, in `cols` columns."""

    cols: int
    piece: int
    tokens: int
    num_warps: int

    @classmethod
    def rule(cls, cols: int, itemsize: int) -> _SumBlocks:
        return cls(min(cols, 1024), 256, 8, 4)

    def candidates(self) -> list[_SumBlocks]:
        changes = ({"piece": 64}, {"tokens": 4}, {"tokens": 16, "num_warps": 8}, {"num_warps": 8})
        narrow = replace(self, cols=min(self.cols, 512))
        return [narrow, *(replace(self, **each) for each in changes)]


@remembered
def _prepared_gather(num_tokens: int, shape: torch.Size, itemsize: int, first_row: int) -> Prepared:
    num_rows, num_cols = shape
    padded = next_power_of_2(num_cols)
    blocks = _GatherBlocks.chosen(cols=padded, itemsize=itemsize)
    cols = min(padded, blocks.elements)
    tokens = blocks.elements // cols
    num_col_blocks, unit = ceil_div(num_cols, cols), unit_of(num_cols)
    return Prepared(
        (ceil_div(num_tokens, tokens) * num_col_blocks,),
        (num_tokens, num_cols // unit, num_rows, first_row, num_col_blocks),
        UNIT=unit,
        TOKENS=tokens,
        COLS=cols,
        num_warps=blocks.num_warps,
    )


@operator("nanotron_fast::embedding_gather")
def gather(ids: Tensor, weight: Tensor, first_row: int, vocab: int) -> Tensor:
    """(tokens,) -> (tokens, hidden), this rank's part of the sum over all ranks."""
    if ids.device.type == "cpu":
        _check_ids(ids, vocab)
    num_tokens, shape = ids.shape[0], weight.shape
    if not uses_triton(weight):
        num_rows = shape[0]
        rows = _local_rows(ids, num_rows, first_row, None)
        is_here = rows < num_rows
        values = weight[torch.where(is_here, rows, 0)]
        return values.masked_fill_(~is_here.unsqueeze(1), 0)
    out = weight.new_empty((num_tokens, shape[1]))
    prepared = _prepared_gather(num_tokens, shape, weight.element_size(), first_row)
    prepared.launch(gather_kernel, ids, weight, out)
    return out


@gather.register_fake
def _(ids, weight, first_row, vocab):
    return weight.new_empty(ids.shape[0], weight.shape[1])


@operator("nanotron_fast::embedding_sum")
def sum_by_id(
    dy: Tensor, ids: Tensor, num_rows: int, first_row: int, padding_idx: int | None
) -> Tensor:
    """dy (tokens, hidden), contiguous -> dweight (rows, hidden) in dy's dtype."""
    num_cols = dy.shape[1]
    if not uses_triton(dy) or dy.dtype == torch.float64:
        wide = torch.promote_types(dy.dtype, torch.float32)
        total = dy.new_zeros(num_rows, num_cols, dtype=wide)
        _add_torch(total, dy, _local_rows(ids, num_rows, first_row, padding_idx))
        return total.to(dy.dtype)
    dweight = dy.new_zeros(num_rows, num_cols)
    _launch_sums(dweight, dy, _local_rows(ids, num_rows, first_row, padding_idx), is_added=False)
    return dweight


def _add_torch(total: Tensor, dy: Tensor, rows: Tensor) -> None:
    """Adds the sums of rows; those that are not here add zeros to the first."""
    is_here = rows < total.shape[0]
    values = dy.to(total.dtype).masked_fill(~is_here.unsqueeze(1), 0)
    total.index_add_(0, torch.where(is_here, rows, 0), values)


def _launch_sums(dweight: Tensor, dy: Tensor, rows: Tensor, *, is_added: bool) -> None:
    """Writes the sums of rows that occur, or adds them to what is there."""
    if dy.numel() == 0:
        return
    num_tokens, num_cols = dy.shape
    rows, order = torch.sort(rows, stable=True)
    tuned = _SumBlocks.chosen(cols=next_power_of_2(num_cols), itemsize=dy.element_size())
    num_pieces = ceil_div(num_tokens, tuned.piece)
    partial = torch.empty(2 * num_pieces, num_cols, dtype=torch.float32, device=dy.device)
    num_col_blocks, unit = ceil_div(num_cols, tuned.cols), unit_of(num_cols)
    sizes = (num_tokens, num_cols // unit, dweight.shape[0], num_col_blocks)
    blocks = {
        "IS_ADDED": is_added,
        "UNIT": unit,
        "PIECE": tuned.piece,
        "COLS": tuned.cols,
        "num_warps": tuned.num_warps,
    }
    on_grid(sum_kernel, (num_tokens * num_col_blocks,))(
        rows, order, dy, dweight, partial, *sizes, TOKENS=tuned.tokens, **blocks
    )
    if num_pieces > 1:
        on_grid(join_kernel, (num_pieces * num_col_blocks,))(
            rows, partial, dweight, *sizes, **blocks
        )


@sum_by_id.register_fake
def _(dy, ids, num_rows, first_row, padding_idx):
    return dy.new_empty(num_rows, dy.shape[1])


@operator("nanotron_fast::embedding_add_", mutates_args=("total",))
def add_by_id(
    total: Tensor, dy: Tensor, ids: Tensor, first_row: int, padding_idx: int | None
) -> None:
    """Adds what `sum_by_id` gives, unrounded, to total (rows, hidden), fp32: a main gradient."""
    rows = _local_rows(ids, total.shape[0], first_row, padding_idx)
    if uses_triton(dy) and dy.dtype != torch.float64 and total.is_contiguous():
        _launch_sums(total, dy, rows, is_added=True)
    else:
        _add_torch(total, dy, rows)
