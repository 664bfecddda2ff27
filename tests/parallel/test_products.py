"""Products beside communication: against the same ones whole, and how many there are of what size.

What is counted is what a GPU would launch: products, with their rows, and bytes that are copied.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.counting import Counts
from nanotron_fast.kernels.runtime.collectives import Ranks, resolve
from nanotron_fast.parallel import chunks, column_linear, row_linear, tensor_parallel_mlp
from nanotron_fast.parallel.chunks import AS_THEY_ARE, blocks_of_ranks, order_of
from nanotron_fast.parallel.products import gather_linear, linear_all_reduce, linear_scatter
from tests.parallel.ranks import run_ranks
from tests.parallel.stand_ins import agreed


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_chunks_change_nothing(size: int) -> None:
    run_ranks("tests.parallel.chunk_ranks", size)


@pytest.fixture
def group_of(request) -> Iterator[dist.ProcessGroup]:
    """A group whose collectives end at once, (rank, size): its results are no numbers."""
    rank, size = request.param
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with agreed(False):
            yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


EIGHT = [(rank, 8) for rank in (0, 1, 3, 7)]
by_rank = pytest.mark.parametrize("group_of", EIGHT, indirect=True)


@by_rank
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("total", [1024, 2048, 4096, 8192, 16384])
def test_products_of_a_gather(group_of, total, has_bias) -> None:
    """At tp=8 and 2048 to 8192 rows there were 28 products of 64 to 256 rows."""
    x, weight = torch.empty(total // 8, 4), torch.empty(6, 4)
    bias = torch.empty(6) if has_bias else None
    with Counts() as counts:
        y, gathered, order = gather_linear(x, weight, bias, resolve(group_of))
    cut = len(order.bounds)
    assert cut == {1024: 1, 2048: 2}.get(total, 4)
    rank = group_of.rank()
    if rank in (0, 7) and total >= 4096:
        assert len(counts.rows) == 1 + cut
    elif total == 16384 or (total, rank) == (8192, 3):  # others' rows on both sides are enough
        assert len(counts.rows) == 1 + 2 * cut
    else:  # own rows by themselves, or those of one side, are too few to be a product
        assert len(counts.rows) == cut
    assert min(counts.rows) >= min(total, 512)
    assert sum(counts.rows) == total
    assert counts.copied == []
    assert y.shape == (total, 6)
    assert gathered.shape == (total, 4)


@by_rank
@pytest.mark.parametrize("total", [1024, 2048, 4096, 16384])
def test_products_of_a_scatter_and_of_a_sum(group_of, total) -> None:
    """As many as there are chunks, where a scatter had one for each rank and chunk: 32."""
    x, weight = torch.empty(total, 4), torch.empty(6, 4)
    for product, wanted in ((linear_scatter, {1024: 1, 2048: 2}), (linear_all_reduce, {1024: 1})):
        with Counts() as counts:
            product(x, weight, None, resolve(group_of))
        assert len(counts.rows) == wanted.get(total, 4)
        assert min(counts.rows) >= min(total, 512)
        assert sum(counts.rows) == total
        assert counts.copied == []


def test_one_graph_holds_for_all_sizes() -> None:
    """What decides of chunks asks nothing of the sizes of a graph, which are symbols."""
    counter = CompileCounter()
    ranks = Ranks("", 0, 2)

    def is_cut(x: Tensor) -> Tensor:
        return x + order_of(len(x), ranks, total=2 * len(x), blocks=1).is_cut

    compiled = torch.compile(is_cut, backend=counter, dynamic=True, fullgraph=True)
    for rows in (8, 2 * chunks.MIN_ROWS):
        assert compiled(torch.zeros(rows)).sum() == 0
    assert counter.frame_count == 1


HIDDEN, FEATURES = 64, 16  # of a layer, and of a rank's part of it


@by_rank
@pytest.mark.parametrize("main", [False, True])
def test_what_a_linear_copies(group_of, main) -> None:
    """Of the two that a weight's gradient is made of, once the narrow one: not what was gathered.

    That would be 4096 * 64 elements.
    """
    total = 4096
    narrow = total * FEATURES * 4
    x = torch.empty(total // 8, HIDDEN, requires_grad=True)
    column = torch.empty(FEATURES, HIDDEN, requires_grad=True)
    row = torch.empty(HIDDEN, FEATURES, requires_grad=True)
    if main:
        column.main_grad, row.main_grad = torch.zeros_like(column), torch.zeros_like(row)
    options = {"group": group_of, "mode": "reduce_scatter"}
    for recompute in (False, True):
        with Counts() as counts:
            y = column_linear(x, column, **options, recompute_allgather=recompute)
            y.backward(torch.empty_like(y))
        assert sum(counts.copied) == (0 if recompute else narrow)
    h = torch.empty(total, FEATURES, requires_grad=True)
    with Counts() as counts:
        y = row_linear(h, row, **options)
        y.backward(torch.empty_like(y))
    assert sum(counts.copied) == narrow
    # Forward's, dx's, and dw's: with a main gradient one for each chunk, beside what travels.
    gathers = 5 if group_of.rank() in (0, 7) else 4
    assert len(counts.rows) == 4 + gathers + (4 if main else 1)


@by_rank
def test_what_the_mlp_copies(group_of) -> None:
    total = 4096
    x = torch.empty(total // 8, HIDDEN, requires_grad=True)
    gate_up = torch.empty(2 * FEATURES, HIDDEN, requires_grad=True)
    down = torch.empty(HIDDEN, FEATURES, requires_grad=True)
    with Counts() as counts:
        y = tensor_parallel_mlp(x, gate_up, down, group=group_of, mode="reduce_scatter")
        y.backward(torch.empty_like(y))
    # d_gate_up and the activation's output.
    assert sum(counts.copied) == total * (2 * FEATURES + FEATURES) * 4


def test_how_rows_are_cut() -> None:
    def cut(rows: int, size: int) -> list[int]:
        order = order_of(rows, Ranks("", 0, size), total=rows * size, blocks=size - 1)
        return [end - first for first, end in order.bounds] if order.is_cut else [rows]

    assert cut(255, 8) == [255]  # under MIN_ROWS in all
    assert cut(256, 8) == [128, 128]
    assert cut(512, 8) == [128] * 4
    assert cut(650, 8) == [128, 128, 128, 266]  # whole tiles, and what is left
    assert cut(1024, 2) == [512, 512]
    assert cut(1023, 2) == [1023]
    assert cut(1536, 2) == [512] * 3
    assert cut(100, 32) == [100]  # less than a tile of each rank
    assert cut(10**6, 1) == [10**6]


def test_which_ranks_rows_are_one_product() -> None:
    def blocks(rows: int, rank: int, size: int) -> list[tuple[int, int]]:
        order = order_of(rows, Ranks("", rank, size), total=rows * size, blocks=size - 1)
        return blocks_of_ranks(order, rank)

    assert blocks(2048, 0, 2) == [(1, 2)]
    assert blocks(2048, 1, 2) == [(0, 1)]
    assert blocks(2048, 3, 8) == [(0, 3), (4, 8)]
    assert blocks(1024, 3, 8) == [(0, 3), (4, 8)]  # three ranks' 256 rows
    assert blocks(1024, 1, 8) == [(0, 8)]  # 256 rows of one rank
    assert blocks(512, 7, 8) == [(0, 7)]
    assert blocks(256, 7, 8) == [(0, 8)]  # own rows are 256


@pytest.mark.parametrize("rows", [1, 13, 16])
def test_an_order_holds_every_row_once(monkeypatch, rows) -> None:
    monkeypatch.setattr(chunks, "MIN_ROWS", 1)
    monkeypatch.setattr(chunks, "MIN_PRODUCT_ROWS", 1)
    monkeypatch.setattr(chunks, "TILE_ROWS", 1)
    order = order_of(rows, Ranks("", 0, 3), total=3 * rows, blocks=2)
    natural = torch.arange(3 * rows * 2).view(3 * rows, 2)
    arranged: Tensor = order.arranged(natural)
    if not order.is_cut:
        assert arranged is natural
        return
    arrived = [natural.view(3, rows, 2)[:, first:end].flatten(0, 1) for first, end in order.bounds]
    assert torch.equal(arranged, torch.cat(arrived))
    assert AS_THEY_ARE.arranged(natural) is natural
