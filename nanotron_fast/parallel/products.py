"""Matrix products whose communication runs beside them.

Three ways, chosen for each product: torch's symmetric memory where the group has it (`symmetric`),
chunks over the group's own collectives (`chunks`; NCCL, gloo), and one after the other.

Rows are dimension 0; x is (rows, in), a weight (out, in), as torch.nn.functional.linear takes them.
A chunk's rows of all ranks are one product: a batch of ranks whose weight is the same one, read
from where they arrived and written to where they belong.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanotron_fast.kernels.runtime.collectives import Ranks
from nanotron_fast.parallel import chunks, symmetric
from nanotron_fast.parallel.chunks import AS_THEY_ARE, Order, blocks_of_ranks, order_of
from nanotron_fast.parallel.communication import (
    Pending,
    Together,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)

# FLOPs of an H100 in bf16 in the time that NVLink brings a byte (989e12 and 450e9 a second). A row
# linear's backward does 4 * in * out a row that arrives in 2 * out bytes: where its 2 * in a byte
# are fewer, communication is what takes the time, and products beside it are free.
FLOPS_A_BYTE = 2198

# Is given each chunk of gathered rows: its first row and its end, and (size, end - first, in).
OnArrival = Callable[[int, int, Tensor], None]


def gather_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ranks: Ranks,
    *,
    keeps_gathered: bool = True,
    on_arrival: OnArrival | None = None,
) -> tuple[Tensor, Tensor | None, Order]:
    """Gathers x (rows / size, in) -> (rows, in) and multiplies: (rows, out), and the gathered x.

    Args:
        keeps_gathered: return the gathered x, and not None.
        on_arrival: called with each chunk of x after its product, while the next ones travel; with
            all of x where there are no chunks.

    Returns:
        the product, its rows rank after rank; the gathered x; the order of the gathered x's rows.
    """
    size, rows = ranks.size, x.shape[0]
    order = order_of(rows, ranks, total=size * rows, blocks=size - 1)
    if _is_symmetric(size * rows, x, ranks):
        order = AS_THEY_ARE
        gathered, (out,) = torch.ops.symm_mem.fused_all_gather_matmul(
            *(x.contiguous(), [weight.t()], 0, ranks.name),
            return_A=keeps_gathered or on_arrival is not None,
        )
        out = out if bias is None else out.add_(bias)
    elif order.is_cut:
        out, gathered = _gather_linear_in(order, x.contiguous(), weight, bias, ranks, on_arrival)
        return out, gathered if keeps_gathered else None, order
    else:
        gathered = start_all_gather(x, ranks).wait()
        out = F.linear(gathered, weight, bias)
    if on_arrival is not None:
        on_arrival(0, rows, gathered.unflatten(0, (size, rows)))
    return out, gathered, order


def _gather_linear_in(
    order: Order,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ranks: Ranks,
    on_arrival: OnArrival | None,
) -> tuple[Tensor, Tensor]:
    """In chunks: the product, rank after rank, and the gathered x as it arrived."""
    size, rank = ranks.size, ranks.rank
    gathered = x.new_empty(size * x.shape[0], x.shape[1])
    out = x.new_empty(size, x.shape[0], weight.shape[0])
    parts = order.parts(gathered)
    travelling = [
        start_all_gather(x[first:end], ranks, out=part.flatten(0, 1))
        for (first, end), part in zip(order.bounds, parts, strict=True)
    ]
    blocks = blocks_of_ranks(order, rank)
    if blocks != [(0, size)]:
        _linear_into(out[rank], x, weight, bias)
    for (first, end), part, pending in zip(order.bounds, parts, travelling, strict=True):
        pending.wait()
        for low, high in blocks:
            _linear_into(out[low:high, first:end], part[low:high], weight, bias)
        if on_arrival is not None:
            on_arrival(first, end, part)
    return out.flatten(0, 1), gathered


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
    divides = x.shape[0] % ranks.size == 0  # rows that do not are named by the scatter
    if divides and not may_have_bias and _is_symmetric(x.shape[0], x, ranks):
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(
            x.contiguous(), weight.t(), "sum", 0, ranks.name
        )
    return _start_linear_scatter(x, weight, bias, ranks).wait()


def _start_linear_scatter(x: Tensor, weight: Tensor, bias: Tensor | None, ranks: Ranks) -> Pending:
    """The same over the group's collectives; the last chunks are still on their way."""
    size = ranks.size
    rows = x.shape[0] // size
    order = order_of(rows, ranks, total=x.shape[0], blocks=size)
    if not order.is_cut or rows * size != x.shape[0]:
        return start_reduce_scatter(F.linear(x, weight, bias), ranks)
    by_rank = x.reshape(size, rows, -1)
    out = x.new_empty(rows, weight.shape[0])
    works = []
    for first, end in order.bounds:
        part = x.new_empty(size, end - first, weight.shape[0])
        _linear_into(part, by_rank[:, first:end], weight, bias)
        works.append(start_reduce_scatter(part.flatten(0, 1), ranks, out=out[first:end]))
    return Pending(out, Together(works))


def linear_all_reduce(x: Tensor, weight: Tensor, bias: Tensor | None, ranks: Ranks) -> Tensor:
    """Multiplies x (rows, in) and sums over ranks: (rows, out). In chunks of rows."""
    return _start_linear_all_reduce(x, weight, bias, ranks).wait()


def _start_linear_all_reduce(
    x: Tensor, weight: Tensor, bias: Tensor | None, ranks: Ranks
) -> Pending:
    rows = x.shape[0]
    order = order_of(rows, ranks, total=rows, blocks=1)
    if not order.is_cut:
        return start_all_reduce(F.linear(x, weight, bias), ranks)
    out = x.new_empty(rows, weight.shape[0])
    works = []
    for first, end in order.bounds:
        _linear_into(out[first:end], x[first:end], weight, bias)
        works.append(start_all_reduce(out[first:end], ranks))
    return Pending(out, Together(works))


def input_gradient(
    dy: Tensor, weight: Tensor, mode: str, ranks: Ranks, *, is_early: bool, is_last: bool = False
) -> Pending:
    """Starts the sum over ranks of dy (rows, out) @ weight (out, in), scattered or not.

    The weight's gradient can be computed until it is waited for.

    Args:
        is_early: nothing else travels. The sum then begins with the first chunk of the product;
            behind something else it would have to wait all the same.
        is_last: no product follows that would cover the sum's way.
    """
    scatters = mode == "reduce_scatter"
    if is_last:
        sum_up = linear_scatter if scatters else linear_all_reduce
        return Pending(sum_up(dy, weight.t(), None, ranks))
    # Devices that reach each other's memory are fast: what follows covers all of the way.
    if is_early and not (scatters and _is_symmetric(dy.shape[0], dy, ranks)):
        start = _start_linear_scatter if scatters else _start_linear_all_reduce
        return start(dy, weight.t(), None, ranks)
    return (start_reduce_scatter if scatters else start_all_reduce)(dy @ weight, ranks)


def row_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, main_grad: Tensor | None, ranks: Ranks, *, is_asked: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What a linear whose output was scattered has for gradients.

    A main gradient is added to chunk by chunk while others travel, where they take longer than the
    products do. A gradient in a low precision is one product: it is to be rounded once.

    Args:
        dy: (rows / size, out), this rank's rows of the output's gradient.
        x: (rows, in), the input; weight: (out, in).
        main_grad: (out, in) fp32, or None.
        is_asked: whether the weight's gradient is wanted.

    Returns:
        the input's gradient (rows, in); the weight's, None where it was added to the main gradient
        or is not wanted; dy of all ranks (rows, out), its rows in no certain order.
    """
    in_chunks = is_asked and main_grad is not None and 2 * x.shape[1] < FLOPS_A_BYTE

    def add(first: int, end: int, arrived: Tensor) -> None:
        rows = x.unflatten(0, (ranks.size, len(dy)))[:, first:end]
        weight_gradient(arrived.flatten(0, 1), rows.flatten(0, 1), main_grad)

    dx, whole, order = gather_linear(
        dy, weight.t(), None, ranks, on_arrival=add if in_chunks else None
    )
    assert whole is not None
    dw = None
    if is_asked and not in_chunks:
        dw = weight_gradient(whole, order.arranged(x), main_grad)
    return dx, dw, whole


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


def _is_symmetric(total: int, x: Tensor, ranks: Ranks) -> bool:
    """Whether a product of so many rows, over all ranks, runs over symmetric memory."""
    return chunks.is_large(total, ranks) and symmetric.is_used(x.device, ranks)


def _linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """x (rows, in), or (ranks, rows, in) of any stride between ranks, to out, which is like it."""
    if x.dim() == 3:
        # A stride of 0 and strides between ranks are what BLAS's batches take: nothing is copied.
        by_rank = weight.t().expand(x.shape[0], -1, -1)
        if bias is None:
            torch.bmm(x, by_rank, out=out)
        else:
            torch.baddbmm(bias, x, by_rank, out=out)
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
