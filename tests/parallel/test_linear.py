"""Parallel layers against the whole ones: real ranks over gloo, and what is refused."""

from __future__ import annotations

import pytest
import torch

from nanotron_fast.errors import TopologyError
from nanotron_fast.parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    column_linear,
    row_linear,
)
from tests.parallel.ranks import run_ranks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree_with_the_whole(size: int) -> None:
    run_ranks("tests.parallel.linear_ranks", size)


@pytest.mark.parametrize("mode", ["all_reduce", "reduce_scatter"])
@pytest.mark.parametrize("shape", [(3,), (2, 5), (0,)])
def test_a_rank_alone_is_a_linear_layer(mode, shape) -> None:
    # Nanotron's own raises in backward here, with one rank and three dimensions.
    x = torch.randn(*shape, 6, dtype=torch.float64, device=DEVICE, requires_grad=True)
    for kind in (ColumnParallelLinear, RowParallelLinear):
        layer = kind(6, 4, mode=mode, bias=True, dtype=torch.float64, device=DEVICE)
        y = layer(x)
        expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(y)
        inputs = (x, layer.weight, layer.bias)
        for ours, theirs in zip(
            torch.autograd.grad(y, inputs, dy),
            torch.autograd.grad(expected, inputs, dy),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


def test_only_what_is_asked_for_is_computed() -> None:
    x = torch.randn(3, 6, device=DEVICE)
    weight = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    y = column_linear(x, weight)
    y.sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
def test_main_gradients_are_added_to_in_fp32(kind, dtype) -> None:
    """On a GPU one product reads bf16 and adds to fp32."""
    torch.manual_seed(0)
    layer = kind(32, 48, bias=True, device=DEVICE, dtype=dtype)
    x = torch.randn(24, 32, device=DEVICE, dtype=dtype, requires_grad=True)
    dy = torch.randn(24, 48, device=DEVICE, dtype=dtype)
    parameters = (layer.weight, layer.bias)
    for parameter in parameters:
        parameter.main_grad = torch.ones_like(parameter, dtype=torch.float32)
    layer(x).backward(dy)
    expected = (dy.double().t() @ x.detach().double() + 1, dy.double().sum(0) + 1)
    for parameter, wanted in zip(parameters, expected, strict=True):
        assert parameter.grad is None
        torch.testing.assert_close(parameter.main_grad.double(), wanted, rtol=1e-4, atol=1e-4)


def test_compiles_without_a_graph_break() -> None:
    layer = ColumnParallelLinear(6, 4, bias=True, device=DEVICE)
    x = torch.randn(3, 6, device=DEVICE, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"column_linear: x \(3, 5\) for weight \(4, 6\)"):
        column_linear(torch.randn(3, 5), torch.randn(4, 6))
    for linear in (column_linear, row_linear):
        for shapes in (((6,), (4, 6)), ((), (4, 6)), ((3, 6), (6,))):
            with pytest.raises(ValueError, match=rf"{linear.__name__}: x .* for weight"):
                linear(*map(torch.randn, shapes))
        # One number would be added to every feature.
        with pytest.raises(ValueError, match=rf"{linear.__name__}: bias \(1,\) for weight"):
            linear(torch.randn(3, 6), torch.randn(4, 6), torch.randn(1))
    with pytest.raises(ValueError, match="mode 'both': choose all_reduce or reduce_scatter"):
        column_linear(torch.randn(3, 6), torch.randn(4, 6), mode="both")
    with pytest.raises(ValueError, match=r"\(1, 2\) sum to 3, not to out_features 4"):
        ColumnParallelLinear(6, 4, contiguous_chunks=(1, 2))
    assert issubclass(TopologyError, ValueError)
