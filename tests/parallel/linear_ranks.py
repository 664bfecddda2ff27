"""A rank of test_linear.py: column, row and embedding layers against the whole ones, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from nanotron_fast.kernels.runtime.collectives import resolve
from nanotron_fast.parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from nanotron_fast.parallel.dispatch import Routes
from tests.parallel.ranks import check, join, leaf, run_cases, shard, with_chunks
from tests.parallel.stand_ins import agreed, fused_products

IN, OUT = 12, 24
MODES = ("all_reduce", "reduce_scatter")


def column(mode: str, recompute: bool, bias: bool, shape: tuple[int, ...], mesh) -> None:
    x, dy = torch.randn(*shape, IN).double(), torch.randn(*shape, OUT).double()
    weight, b = torch.randn(OUT, IN).double(), torch.randn(OUT).double()
    whole = [leaf(x), leaf(weight), leaf(b)]
    y = F.linear(whole[0], whole[1], whole[2] if bias else None)
    y.backward(dy)

    chunks = [8, 12, 4]
    layer = ColumnParallelLinear(
        *(IN, OUT),
        group=mesh,
        mode=mode,
        bias=bias,
        recompute_allgather=recompute,
        contiguous_chunks=chunks,
        dtype=torch.float64,
    )
    layer.load_whole(weight, b)
    is_sharded = mode == "reduce_scatter"
    mine = leaf(shard(x, 0) if is_sharded else x)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours = layer(mine)
    check(ours, shard(y, -1, chunks), "output")
    ours.backward(shard(dy, -1, chunks))
    check(mine.grad, shard(whole[0].grad, 0) if is_sharded else whole[0].grad, "dx")
    check(layer.weight.grad, shard(whole[1].grad, 0, chunks), "dw")
    if bias:
        check(layer.bias.grad, shard(whole[2].grad, 0, chunks), "db")
    if recompute and is_sharded:
        inputs = sum(t.numel() for t in saved) - layer.weight.numel()
        assert inputs == mine.numel(), "more than the shard is saved"


def row(mode: str, bias: bool, shape: tuple[int, ...], mesh) -> None:
    x, dy = torch.randn(*shape, IN).double(), torch.randn(*shape, OUT).double()
    weight, b = torch.randn(OUT, IN).double(), torch.randn(OUT).double()
    whole = [leaf(x), leaf(weight), leaf(b)]
    y = F.linear(whole[0], whole[1], whole[2] if bias else None)
    y.backward(dy)

    layer = RowParallelLinear(IN, OUT, group=mesh, mode=mode, bias=bias, dtype=torch.float64)
    assert (layer.bias is not None) == (bias and mesh.get_local_rank() == 0)
    layer.load_whole(weight, b)
    is_sharded = mode == "reduce_scatter"
    mine = leaf(shard(x, -1))
    ours = layer(mine)
    check(ours, shard(y, 0) if is_sharded else y, "output")
    ours.backward(shard(dy, 0) if is_sharded else dy)
    check(mine.grad, shard(whole[0].grad, -1), "dx")
    check(layer.weight.grad, shard(whole[1].grad, 1), "dw")
    if layer.bias is not None:
        check(layer.bias.grad, whole[2].grad, "db")


def main_gradients(mode: str, mesh) -> None:
    """bf16 weights whose gradients are added to fp32: nothing is rounded on the way."""
    x = torch.randn(8, IN).bfloat16()
    layer = ColumnParallelLinear(IN, OUT, group=mesh, mode=mode, bias=True, dtype=torch.bfloat16)
    for parameter in layer.parameters():
        parameter.main_grad = torch.ones(parameter.shape)
    y = layer(leaf(shard(x, 0) if mode == "reduce_scatter" else x))
    dy = torch.randn_like(y)
    y.backward(dy)
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    check(layer.weight.main_grad, 1 + dy.double().t() @ x.double(), "main grad", 1e-5)
    check(layer.bias.main_grad, 1 + dy.double().sum(0), "main grad of the bias", 1e-5)


def copies(mesh) -> None:
    """As an average over time is kept: other weights, the same ranks."""
    for group in (mesh, mesh.get_group(), None):
        layers = (
            ColumnParallelLinear(IN, OUT, group=group),
            RowParallelLinear(IN, OUT, group=group, bias=True),
            VocabParallelEmbedding(OUT, IN, group=group),
        )
        model = torch.nn.ModuleList(layers).requires_grad_(False)
        for layer, copied in zip(model, deepcopy(model), strict=True):
            x = torch.zeros(4, dtype=torch.int64)
            if layer is not layers[2]:
                x = torch.randn(4, layer.weight.shape[1])
            assert torch.equal(copied(x), layer(x))
            copied.weight.zero_()
            assert layer.weight.any()
            assert copied.group is layer.group


def gradients_of_gradients(mode: str, mesh) -> None:
    """Torch does not follow what ranks send each other: asked for, the graph refuses."""
    layers = (
        ColumnParallelLinear(IN, OUT, group=mesh, mode=mode),
        RowParallelLinear(IN, OUT, group=mesh, mode=mode),
        VocabParallelEmbedding(OUT, IN, group=mesh, mode=mode),
    )
    for layer in layers:
        x = torch.zeros(4, dtype=torch.int64)
        if layer is not layers[2]:
            x = torch.randn(4, layer.weight.shape[1])
        loss = layer(x).square().sum()
        (expected,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
        (found,) = torch.autograd.grad(loss, layer.weight, create_graph=True)
        assert torch.equal(found, expected)
        with pytest.raises(RuntimeError, match="has no second derivative"):
            torch.autograd.grad(found.sum(), layer.weight)


def gradients_of_gradients_of_trips(mesh) -> None:
    """Of rows that go to the ranks of their experts and come back, likewise."""
    routes = Routes(torch.full((mesh.size(),), 2), resolve(mesh))
    x = torch.randn(2 * mesh.size(), 3, requires_grad=True)
    loss = routes.bring_back(routes.arrive(*routes.leave(x))).square().sum()
    (found,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.equal(found, 2 * x)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(loss + found.square().sum(), x)


def with_symmetric_memory(case: Callable[[], None]) -> None:
    """The same case over torch's fused products, whose plain path serves a CPU here."""
    with fused_products() as calls, agreed(True):
        with_chunks(case)
    assert calls


def cases(mesh) -> Iterator[tuple[str, Callable[[], None]]]:
    for mode, recompute, bias, shape in product(
        MODES, (False, True), (False, True), ((8,), (16, 2), (20,))
    ):
        case = partial(column, mode, recompute, bias, shape, mesh)
        yield f"column {mode} {recompute} {bias} {shape}", case
        yield f"column in chunks {mode} {recompute} {bias} {shape}", partial(with_chunks, case)
        yield (
            f"column, own rows with others' {mode} {recompute} {bias} {shape}",
            partial(with_chunks, case, min_product_rows=mesh.size() - 1),
        )
    for mode, bias, shape in product(MODES, (False, True), ((8,), (16, 2), (20,))):
        case = partial(row, mode, bias, shape, mesh)
        yield f"row {mode} {bias} {shape}", case
        yield f"row in chunks {mode} {bias} {shape}", partial(with_chunks, case)
    for bias in (False, True):
        case = partial(column, "reduce_scatter", True, bias, (16,), mesh)
        yield "column over symmetric memory", partial(with_symmetric_memory, case)
        # A bias on rank 0 alone must not send it another way than the others.
        case = partial(row, "reduce_scatter", bias, (16,), mesh)
        yield "row over symmetric memory", partial(with_symmetric_memory, case)
    for mode in MODES:
        yield f"main gradients {mode}", partial(main_gradients, mode, mesh)
        yield f"gradients of gradients {mode}", partial(gradients_of_gradients, mode, mesh)
    yield "gradients of gradients of trips", partial(gradients_of_gradients_of_trips, mesh)
    yield "copies", partial(copies, mesh)


if __name__ == "__main__":
    group = join()
    run_cases(cases(init_device_mesh("cpu", (group.size(),))))
