"""Gated linear units against their fp64 reference, forward and backward."""

from __future__ import annotations

import pytest
import torch

from nanotron_fast.kernels import glu as module
from nanotron_fast.kernels.glu import (
    ACTIVATIONS,
    glu,
    glu_backward,
    glu_backward_reference,
    glu_forward,
    glu_reference,
)
from tests.kernels.checks import assert_close, wide

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Shapes of gate_up: odd halves, several rows a block, several blocks a row, nothing at all.
SHAPES = [(1, 2), (5, 14), (2, 3, 130), (70, 32), (3, 2 * 1025), (0, 16), (3, 0)]


def run(gate_up, dy, activation):
    gate_up = gate_up.detach().requires_grad_()
    h = glu(gate_up, activation)
    return h, torch.autograd.grad(h, gate_up, dy)[0]


def run_wide(gate_up, dy, activation):
    """With torch's own activations and autograd, in fp64."""
    gate_up = wide(gate_up, True)
    h = glu_reference(gate_up, activation)
    return h, torch.autograd.grad(h, gate_up, wide(dy))[0]


def make(shape, dtype, device):
    torch.manual_seed(0)
    gate_up = (2 * torch.randn(shape, device=device)).to(dtype)
    return gate_up, torch.randn(*shape[:-1], shape[-1] // 2, device=device).to(dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(path, device, shape, dtype, activation) -> None:
    gate_up, dy = make(shape, dtype, device)
    h, d_gate_up = run(gate_up, dy, activation)
    h64, d_gate_up64 = run_wide(gate_up, dy, activation)
    assert h.dtype == d_gate_up.dtype == dtype
    assert_close(h, h64)
    assert_close(d_gate_up, d_gate_up64)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_alone_gives_the_output_too(path, device, activation) -> None:
    gate_up, dy = make((2, 9, 66), torch.float32, device)
    h64, d_gate_up64 = run_wide(gate_up, dy, activation)
    d_gate_up, h = glu_backward(dy, gate_up, activation, with_output=True)
    assert_close(d_gate_up, d_gate_up64)
    assert_close(h, h64)
    assert_close(glu_backward(dy, gate_up, activation), d_gate_up64)
    assert_close(glu_forward(gate_up, activation), h64)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_closed_form_of_the_slope(activation) -> None:
    gate_up, dy = (wide(tensor) for tensor in make((40, 64), torch.float32, "cpu"))
    h64, d_gate_up64 = run_wide(gate_up, dy, activation)
    d_gate_up, h = glu_backward_reference(dy, gate_up, activation, with_output=True)
    torch.testing.assert_close(d_gate_up, d_gate_up64, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(h, h64, rtol=1e-12, atol=1e-14)


def test_rows_that_are_not_contiguous(triton_path) -> None:
    torch.manual_seed(0)
    dy = torch.randn(10, 6, device=triton_path).t()
    for gate_up in (
        torch.randn(6, 64, device=triton_path)[:, 5:25],
        torch.randn(6, 40, device=triton_path)[:, ::2],
        torch.randn(20, 6, device=triton_path).t(),
    ):
        h, d_gate_up = run(gate_up, dy, "silu")
        h64, d_gate_up64 = run_wide(gate_up, dy, "silu")
        assert_close(h, h64)
        assert_close(d_gate_up, d_gate_up64)
        d_gate_up, h = glu_backward(dy, gate_up, with_output=True)
        assert_close(d_gate_up, d_gate_up64)
        assert_close(h, h64)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extremes(path, device, activation) -> None:
    gate = torch.tensor([-1e30, -1e4, -90.0, -30.0, -0.0, 30.0, 90.0, 1e4, 1e30], device=device)
    gate_up = torch.cat((gate, torch.full_like(gate, 0.5)))
    for dtype in (torch.float32, torch.bfloat16):
        h = glu_forward(gate_up.to(dtype), activation).float()
        d_gate, d_up = glu_backward(
            torch.ones_like(gate).to(dtype), gate_up.to(dtype), activation
        ).chunk(2)
        # The identity on the right and zero on the left, to the last bit of these values.
        expected = gate.clamp(min=0).to(dtype).float()
        torch.testing.assert_close(h, 0.5 * expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(d_up.float(), expected, rtol=0, atol=1e-11)
        step = torch.heaviside(gate, torch.tensor(0.5, device=device))
        torch.testing.assert_close(d_gate.float(), 0.5 * step, rtol=0, atol=1e-11)


def test_not_a_number_stays_one(path, device) -> None:
    gate_up = torch.tensor([torch.nan, 1.0, 1.0, torch.nan], device=device)
    for activation in ACTIVATIONS:
        assert glu_forward(gate_up, activation).isnan().all()
        d_gate_up = glu_backward(torch.ones(2, device=device), gate_up, activation)
        assert d_gate_up.isnan().tolist() == [True, True, True, False]


def test_saves_nothing_but_its_input(triton_path) -> None:
    gate_up = torch.randn(16, 64, device=triton_path).bfloat16().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        glu(gate_up)
    assert [tensor.data_ptr() for tensor in saved] == [gate_up.data_ptr()]


def test_the_input_is_not_written(triton_path) -> None:
    gate_up, dy = make((7, 34), torch.float32, triton_path)
    before = gate_up.clone()
    run(gate_up, dy, "silu")
    assert torch.equal(gate_up, before)


def test_operators_are_what_torch_expects(triton_path) -> None:
    gate_up, dy = make((5, 12), torch.float32, triton_path)
    torch.library.opcheck(module._forward.overload, (gate_up, "silu"))
    torch.library.opcheck(module._backward.overload, (dy, gate_up, "gelu", False))
    torch.library.opcheck(module._backward.overload, (dy, gate_up, "gelu_tanh", True))


def test_compiles_without_a_graph_break(path, device) -> None:
    gate_up, _ = make((2, 5, 12), torch.float32, device)
    leaves = [gate_up.clone().requires_grad_() for _ in range(2)]
    compiled = torch.compile(glu, fullgraph=True, backend="aot_eager")
    for function, leaf in zip((glu, compiled), leaves, strict=True):
        function(leaf, "silu").square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    compiled = torch.compile(glu_backward, fullgraph=True, backend="aot_eager")
    arguments = (torch.ones(2, 5, 6, device=device), gate_up, "gelu")
    torch.testing.assert_close(
        compiled(*arguments, with_output=True), glu_backward(*arguments, with_output=True)
    )


def test_what_does_not_fit_is_named(device) -> None:
    gate_up = torch.randn(3, 8, device=device)
    with pytest.raises(ValueError, match=r"activation 'relu': choose silu, gelu, gelu_tanh"):
        glu(gate_up, "relu")
    with pytest.raises(ValueError, match=r"gate_up \(3, 7\) has no two equal halves"):
        glu(gate_up[:, :7])
    with pytest.raises(ValueError, match=r"gate_up is torch.int64"):
        glu(gate_up.long())
    with pytest.raises(ValueError, match=r"dy \(3, 8\) for gate_up \(3, 8\)"):
        glu_backward(gate_up, gate_up)
