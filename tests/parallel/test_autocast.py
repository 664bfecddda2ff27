"""Linears, fused blocks and the loss under autocast, against torch's own functions under it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanotron_fast.kernels.linear_cross_entropy import linear_cross_entropy
from nanotron_fast.kernels.rms_norm import rms_norm
from nanotron_fast.kernels.rope import rope_tables
from nanotron_fast.parallel import (
    column_linear,
    row_linear,
    tensor_parallel_attention,
    tensor_parallel_mlp,
)
from nanotron_fast.parallel.grouped import Runs, grouped_linear

BF16, FP32 = torch.bfloat16, torch.float32
HEADS = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 8}
TARGET = torch.tensor([1, 5, 2, 0, 7, 3])
RUNS = Runs(torch.tensor([4, 2]))
Call = Callable[..., Tensor]


def attention(x: Tensor, qkv: Tensor, out: Tensor) -> Tensor:
    cos, sin = rope_tables(8, 6)
    return tensor_parallel_attention(x, qkv, out, cos, sin, **HEADS)


def mlp_of_torch(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def grouped_of_torch(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([x[:4] @ weight[0], x[4:] @ weight[1]])


# Name -> shapes, ours, and torch's where it has one for such a call.
CASES: dict[str, tuple[list[tuple[int, ...]], Call, Call | None]] = {
    "column": ([(6, 8), (10, 8), (10,)], column_linear, F.linear),
    "row": ([(6, 8), (10, 8), (10,)], row_linear, F.linear),
    "mlp": ([(6, 8), (16, 8), (8, 8)], tensor_parallel_mlp, mlp_of_torch),
    "attention": ([(6, 8), (32, 8), (8, 16)], attention, None),
    "grouped": ([(6, 8), (2, 8, 5)], lambda x, w: grouped_linear(x, w, RUNS), grouped_of_torch),
    "loss": (
        [(6, 8), (12, 8)],
        lambda x, w: linear_cross_entropy(x, w, TARGET),
        lambda x, w: F.cross_entropy(F.linear(x, w), TARGET),
    ),
    "losses": (
        [(6, 8), (12, 8)],
        lambda x, w: linear_cross_entropy(x, w, TARGET, reduction="none"),
        lambda x, w: F.cross_entropy(F.linear(x, w), TARGET, reduction="none"),
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


def leaves(name: str) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).requires_grad_() for shape in CASES[name][0]]


def run(call: Call, tensors: list[Tensor], inside: bool = False) -> tuple[Tensor, list[Tensor]]:
    """The result and the gradients; backward outside of autocast, as torch asks, or inside."""
    with torch.autocast("cpu", BF16):
        out = call(*tensors)
        if inside:
            out.float().sum().backward()
    if not inside:
        out.float().sum().backward()
    return out.detach(), [tensor.grad for tensor in tensors]


def close(found: Tensor, expected: Tensor) -> None:
    """As two results that were rounded to bf16 a few times on the way."""
    scale = expected.float().abs().max().item()
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0.03 * scale)


@pytest.mark.parametrize("inside", [False, True])
@every_case
def test_forward_and_backward(name, inside) -> None:
    _, ours, theirs = CASES[name]
    out, gradients = run(ours, leaves(name), inside)
    assert out.dtype == (FP32 if name.startswith("loss") else BF16)
    assert all(gradient.dtype == FP32 for gradient in gradients)
    if theirs is None:  # the same in fp32, without autocast
        tensors = leaves(name)
        expected = ours(*tensors)
        expected.sum().backward()
        expected_gradients = [tensor.grad for tensor in tensors]
    else:
        expected, expected_gradients = run(theirs, leaves(name))
    close(out, expected)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        close(found, wanted)


@every_case
def test_main_gradients_are_added_to(name) -> None:
    _, ours, _ = CASES[name]
    _, expected = run(ours, leaves(name))
    tensors = leaves(name)
    for weight in tensors[1:]:
        weight.main_grad = torch.ones_like(weight)
    run(ours, tensors)
    for weight, wanted in zip(tensors[1:], expected[1:], strict=True):
        assert weight.grad is None
        close(weight.main_grad - 1, wanted)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_weight_in_fp32_beside_hidden_in_bf16(reduction) -> None:
    """Without autocast: one cast of the weight, and its gradient as exact as it was summed."""
    hidden, weight = leaves("loss")
    low = hidden.detach().to(BF16).requires_grad_()
    linear_cross_entropy(low, weight, TARGET, reduction=reduction).sum().backward()
    rounded = weight.detach().to(BF16).requires_grad_()
    rounded.main_grad = torch.zeros_like(rounded, dtype=FP32)
    again = hidden.detach().to(BF16).requires_grad_()
    linear_cross_entropy(again, rounded, TARGET, reduction=reduction).sum().backward()
    assert low.grad.dtype == BF16
    assert weight.grad.dtype == FP32
    assert torch.equal(low.grad, again.grad)
    assert torch.equal(weight.grad, rounded.main_grad)
    assert not torch.equal(weight.grad, weight.grad.to(BF16).float())


def test_a_weight_that_is_narrower_is_refused() -> None:
    hidden, weight = leaves("loss")
    for kind in (BF16, torch.float16):
        with pytest.raises(ValueError, match=f"weight .* {kind} for hidden .* torch.float32"):
            linear_cross_entropy(hidden, weight.to(kind), TARGET)
    with pytest.raises(ValueError, match=r"weight .* torch.float32 for hidden .* torch.float64"):
        linear_cross_entropy(hidden.double(), weight, TARGET)


def test_doubles_stay() -> None:
    x, weight, bias = (tensor.detach().double() for tensor in leaves("column"))
    with torch.autocast("cpu", BF16):
        assert column_linear(x, weight, bias).dtype == torch.float64


def test_a_residual_in_fp32_beside_a_product_in_bf16() -> None:
    """As torch adds them under autocast; outside of it two dtypes are refused."""
    x, residual, weight = torch.randn(6, 8).bfloat16(), torch.randn(6, 8), torch.rand(8)
    with torch.autocast("cpu", BF16):
        found = rms_norm(x, weight, residual=residual)
        assert [each.dtype for each in found] == [FP32, FP32]
    expected = rms_norm(x.float(), weight, residual=residual)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match=r"residual .* torch.float32 for x .* torch.bfloat16"):
        rms_norm(x, weight, residual=residual)
