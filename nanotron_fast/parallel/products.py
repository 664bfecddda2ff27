"""Matrix products whose communication runs beside them.

Three ways, chosen for each product: torch's symmetric memory where the group was enabled for it,
chunks over the group's own collectives (NCCL, gloo), and one after the other.

Rows are dimension 0; x is (rows, in), a weight (out, in), as torch.nn.functional.linear takes them.
Below MIN_ROWS a product is too short to hide anything behind, and its pieces too small to run at
full rate: there the collective and the product follow each other.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from nanotron_fast.kernels.runtime.collectives import Ranks
from nanotron_fast.parallel.communication import (
    Pending,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)

# Rows of the whole product, over all ranks (Flux and PyTorch's async TP lose below about as many).
MIN_ROWS = 2048
NUM_CHUNKS = 4


def _num_chunks(rows: int, ranks: Ranks) -> int:
    """How many chunks to cut rows into; 1 where overlap does not pay or torch.compile traces."""
    if ranks.size == 1 or rows < MIN_ROWS or torch.compiler.is_compiling():
        return 1
    return NUM_CHUNKS


def _uses_symmetric_memory(rows: int, x: Tensor, ranks: Ranks) -> bool:
    """Whether torch's fused products over peers' memory are there: the group was enabled for it.

    `torch.distributed._symmetric_memory.enable_symm_mem_for_group(group.group_name)` does that,
    where every two devices of the group reach each other.
    """
    if ranks.size == 1 or rows < MIN_ROWS or torch.compiler.is_compiling():
        return False
    from torch.distributed import _symmetric_memory

    if not hasattr(torch.ops.symm_mem, "fused_all_gather_matmul"):
        return False
    return bool(_symmetric_memory.is_symm_mem_enabled_for_group(ranks.name))


def _bounds(rows: int, chunks: int) -> list[tuple[int, int]]:
    """First row and end of each chunk, without the empty ones."""
    edges = [rows * i // chunks for i in range(chunks + 1)]
    return [(a, b) for a, b in itertools.pairwise(edges) if a < b]


def gather_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ranks: Ranks,
    *,
    keeps_gathered: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Gathers x (rows / size, in) -> (rows, in) and multiplies: (rows, out), and the gathered x.

    In chunks: this rank's own rows are multiplied while the first of the others' travel.
    """
    size, rank = ranks.size, ranks.rank
    rows = x.shape[0]
    if _uses_symmetric_memory(rows * size, x, ranks):
        gathered, (out,) = torch.ops.symm_mem.fused_all_gather_matmul(
            x.contiguous(), [weight.t()], 0, ranks.name, return_A=keeps_gathered
        )
        return (out if bias is None else out.add_(bias)), gathered
    chunks = _num_chunks(rows * size, ranks)
    if chunks == 1:
        gathered = start_all_gather(x, ranks).wait()
        return F.linear(gathered, weight, bias), gathered
    x = x.contiguous()
    bounds = _bounds(rows, chunks)
    travelling = [start_all_gather(x[a:b], ranks) for a, b in bounds]
    out = x.new_empty(size, rows, weight.shape[0])
    gathered = x.new_empty(size, rows, x.shape[1]) if keeps_gathered else None
    _linear_into(out[rank], x, weight, bias)
    for (a, b), pending in zip(bounds, travelling, strict=True):
        arrived = pending.wait().view(size, b - a, -1)
        if gathered is not None:
            gathered[:, a:b].copy_(arrived)
        for other in range(size):
            if other != rank:
                _linear_into(out[other, a:b], arrived[other], weight, bias)
    whole = None if gathered is None else gathered.view(size * rows, -1)
    return out.view(size * rows, -1), whole


def linear_scatter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ranks: Ranks,
    *,
    may_have_bias: bool = False,
) -> Tensor:
    """Multiplies x (rows, in) and scatters the sum over ranks: (rows / size, out).

    In chunks of every rank's rows: one chunk is summed while the next is multiplied.
    `may_have_bias` says that some rank has a bias, perhaps not this one: all ranks must
    communicate alike.
    """
    size = ranks.size
    rows = x.shape[0] // size
    divides = rows * size == x.shape[0]
    if divides and not may_have_bias and _uses_symmetric_memory(x.shape[0], x, ranks):
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(
            x.contiguous(), weight.t(), "sum", 0, ranks.name
        )
    chunks = _num_chunks(x.shape[0], ranks)
    if chunks == 1 or not divides:  # rows that do not divide are named by the scatter
        return start_reduce_scatter(F.linear(x, weight, bias), ranks).wait()
    by_rank = x.reshape(size, rows, -1)
    pending = []
    for a, b in _bounds(rows, chunks):
        part = x.new_empty(size, b - a, weight.shape[0])
        for rank in range(size):
            _linear_into(part[rank], by_rank[rank, a:b], weight, bias)
        pending.append(start_reduce_scatter(part.view(size * (b - a), -1), ranks))
    return torch.cat([each.wait() for each in pending])


def linear_all_reduce(x: Tensor, weight: Tensor, bias: Tensor | None, ranks: Ranks) -> Tensor:
    """Multiplies x (rows, in) and sums over ranks: (rows, out). In chunks of rows."""
    chunks = _num_chunks(x.shape[0], ranks)
    if chunks == 1:
        return start_all_reduce(F.linear(x, weight, bias), ranks).wait()
    out = x.new_empty(x.shape[0], weight.shape[0])
    pending = []
    for a, b in _bounds(x.shape[0], chunks):
        _linear_into(out[a:b], x[a:b], weight, bias)
        pending.append(start_all_reduce(out[a:b], ranks))
    for each in pending:
        each.wait()
    return out


def input_gradient(dy: Tensor, weight: Tensor, mode: str, ranks: Ranks) -> Pending:
    """Starts the sum over ranks of dy (rows, out) @ weight (out, in), scattered or not.

    The weight's gradient can be computed until it is waited for.
    """
    start = start_reduce_scatter if mode == "reduce_scatter" else start_all_reduce
    return start(dy @ weight, ranks)


def weight_gradient(dy: Tensor, x: Tensor, main_grad: Tensor | None) -> Tensor | None:
    """dy (rows, out)^T @ x (rows, in): returned, or added to an fp32 main gradient (out, in)."""
    if main_grad is None:
        return dy.t() @ x
    if dy.dtype == main_grad.dtype:
        main_grad.addmm_(dy.t(), x)
    elif dy.is_cuda:
        # One product that reads and writes fp32: no gradient in the low precision exists.
        torch.addmm(main_grad, dy.t(), x, out_dtype=main_grad.dtype, out=main_grad)
    else:
        main_grad.addmm_(dy.t().to(main_grad.dtype), x.to(main_grad.dtype))
    return None


def bias_gradient(dy: Tensor, main_grad: Tensor | None) -> Tensor | None:
    """The same for a bias: the sum of dy's rows, in fp32 until it is rounded."""
    total = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
    if main_grad is None:
        return total.to(dy.dtype)
    main_grad.add_(total)
    return None


def _linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
