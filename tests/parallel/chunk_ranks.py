"""A rank of test_products.py: products in chunks against the same ones whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from nanotron_fast.kernels.rope import rope_tables
from nanotron_fast.parallel import (
    column_linear,
    products,
    row_linear,
    tensor_parallel_attention,
    tensor_parallel_mlp,
)
from tests.parallel.ranks import check, join, run_cases, with_chunks

# Rows of one rank, which no number of chunks divides; and features.
ROWS, IN, OUT = 13, 12, 10
# Several roundings of a result or of its terms.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 3 * 2**-8,
    torch.float16: 3 * 2**-11,
}
MODES = ("all_reduce", "reduce_scatter")
Call = Callable[..., Tensor]


def of_this_rank(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Not those of another: rows in a wrong order would go unseen."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def results(call: Call, tensors: list[Tensor], needs: tuple[bool, ...], main: bool) -> list[Tensor]:
    """The output, then gradients and main gradients of those that have one."""
    leaves = [tensor.detach().clone() for tensor in tensors]
    for leaf, is_needed in zip(leaves, needs, strict=True):
        leaf.requires_grad_(is_needed)
        if main and leaf is not leaves[0]:
            leaf.main_grad = torch.ones(leaf.shape)
    y = call(*leaves)
    y.backward(torch.linspace(-1, 2 + dist.get_rank(), y.numel()).view(y.shape).to(y.dtype))
    found = [y.detach()]
    for leaf, is_needed in zip(leaves, needs, strict=True):
        has_main = main and leaf is not leaves[0]
        assert (leaf.grad is not None) == (is_needed and not has_main)
        found += [leaf.grad] if leaf.grad is not None else []
        found += [leaf.main_grad] if has_main else []
    return found


def alike(
    call: Call, shapes: list[tuple[int, ...]], needs: tuple[bool, ...], dtype, main: bool, size: int
) -> None:
    tensors = of_this_rank(shapes, dtype)
    if main:
        dtype = max(dtype, torch.float32, key=TOLERANCES.__getitem__)
    found: list[list[Tensor]] = []

    def case() -> None:
        found.append(results(call, tensors, needs, main))

    case()
    with_chunks(case)
    if size > 2:
        with_chunks(case, min_product_rows=size - 1)  # own rows with the others'
    with mock.patch.object(products, "FLOPS_A_BYTE", 0):  # main gradients after all else
        with_chunks(case)
    whole, *others = found
    for mine in others:
        assert len(mine) == len(whole)
        for ours, expected in zip(mine, whole, strict=True):
            check(ours, expected, "chunks", TOLERANCES[dtype])


def traced(group, kind: Callable[..., Tensor], mode: str) -> None:
    """In one graph, whatever the size: torch.compile sees functional collectives, and no chunks."""
    size, is_column = group.size(), kind is column_linear
    rows = ROWS if is_column and mode == "reduce_scatter" else size * ROWS
    tensors = of_this_rank([(rows, IN), (OUT, IN)], torch.float32)
    compiled = torch.compile(
        partial(kind, group=group, mode=mode), fullgraph=True, backend="aot_eager"
    )
    found = []

    def case() -> None:
        found.append(results(compiled, tensors, (True, True), main=False))

    with_chunks(case)
    expected = results(partial(kind, group=group, mode=mode), tensors, (True, True), main=False)
    for ours, theirs in zip(found[0], expected, strict=True):
        check(ours, theirs, "traced", 1e-5)


def linear_cases(group) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every combination of what is needed in fp32; in other dtypes all that there is."""
    size, rank = group.size(), group.rank()
    every = [needs for needs in product((False, True), repeat=3) if any(needs[:2])]
    for mode, dtype, has_bias, main in product(MODES, TOLERANCES, (False, True), (False, True)):
        if main and dtype in (torch.float64, torch.float16):
            continue
        rows = ROWS if mode == "reduce_scatter" else size * ROWS
        column_shapes = [(rows, IN), (OUT, IN), (OUT,)][: 2 + has_bias]
        row_shapes = [(size * ROWS, IN), (OUT, IN), (OUT,)][: 2 + (has_bias and rank == 0)]
        in_full = dtype == torch.float32 and has_bias
        for needs in every if in_full else [(True, True, True)]:
            what = f"{mode} {dtype} bias={has_bias} main={main} {needs}"
            for recompute in (False, True) if mode == "reduce_scatter" else (True,):
                call = partial(column_linear, group=group, mode=mode, recompute_allgather=recompute)
                yield (
                    f"column {what} recompute={recompute}",
                    partial(alike, call, column_shapes, needs[: 2 + has_bias], dtype, main, size),
                )
            call = partial(row_linear, group=group, mode=mode)
            yield (
                f"row {what}",
                partial(alike, call, row_shapes, needs[: len(row_shapes)], dtype, main, size),
            )


def block_cases(group) -> Iterator[tuple[str, Callable[[], None]]]:
    size = group.size()
    cos, sin = rope_tables(16, size * ROWS)

    def attention(x: Tensor, qkv: Tensor, out: Tensor, **options: object) -> Tensor:
        heads = {"num_q_heads": 2 * size, "num_kv_heads": size, "head_dim": 16}
        return tensor_parallel_attention(x, qkv, out, cos, sin, group=group, **heads, **options)

    blocks = {
        "mlp": (partial(tensor_parallel_mlp, group=group), [(10, IN), (IN, 5)]),
        "attention": (attention, [(64, IN), (IN, 32)]),
    }
    every = [needs for needs in product((False, True), repeat=3) if any(needs)]
    for (name, (call, weights)), mode, recompute in product(blocks.items(), MODES, (False, True)):
        shapes = [(ROWS if mode == "reduce_scatter" else size * ROWS, IN), *weights]
        block = partial(call, mode=mode, recompute=recompute)
        for needs in every if mode == "reduce_scatter" else [(True, True, True)]:
            for main in (False, True) if all(needs) else (False,):
                yield (
                    f"{name} {mode} recompute={recompute} main={main} {needs}",
                    partial(alike, block, shapes, needs, torch.float32, main, size),
                )


def traced_cases(group) -> Iterator[tuple[str, Callable[[], None]]]:
    for kind, mode in product((column_linear, row_linear), MODES):
        yield f"traced {kind.__name__} {mode}", partial(traced, group, kind, mode)


if __name__ == "__main__":
    group = join()
    run_cases([*linear_cases(group), *block_cases(group), *traced_cases(group)])
