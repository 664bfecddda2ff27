"""What a model of a user's own may do with our operations, beside training with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanotron_fast.kernels.attention import attention
from nanotron_fast.kernels.attention.sinks import attention_with_sinks
from nanotron_fast.kernels.glu import glu
from nanotron_fast.kernels.linear_cross_entropy import linear_cross_entropy
from nanotron_fast.kernels.rms_norm import rms_norm
from nanotron_fast.parallel import (
    column_linear,
    row_linear,
    tensor_parallel_attention,
    tensor_parallel_mlp,
)

HEADS = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 8}


def loss(hidden: Tensor, weight: Tensor, **options) -> Tensor:
    target = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    return linear_cross_entropy(hidden, weight, target, **options)


def whole_attention(x: Tensor, qkv: Tensor, out: Tensor) -> Tensor:
    cos = torch.ones(len(x), 4, device=x.device)
    return tensor_parallel_attention(x, qkv, out, cos, cos, **HEADS)


# Name -> shapes of the tensors, and the operation.
CASES: dict[str, tuple[list[tuple[int, ...]], Callable[..., Tensor]]] = {
    "rms_norm": ([(6, 8), (8,)], rms_norm),
    "glu": ([(6, 8)], glu),
    "attention": ([(1, 6, 2, 8)] * 3, attention),
    "attention with sinks": ([(1, 6, 2, 8)] * 3 + [(2,)], attention_with_sinks),
    "loss": ([(6, 8), (12, 8)], loss),
    "loss in chunks": ([(6, 8), (12, 8)], lambda x, w: loss(x, w, chunk_tokens=4)),
    "losses": ([(6, 8), (12, 8)], lambda x, w: loss(x, w, reduction="none")),
    "losses in chunks": (
        [(6, 8), (12, 8)],
        lambda x, w: loss(x, w, reduction="none", chunk_tokens=4),
    ),
    "mlp": ([(6, 8), (16, 8), (8, 8)], tensor_parallel_mlp),
    "attention block": ([(6, 8), (32, 8), (8, 16)], whole_attention),
    "column": ([(6, 8), (10, 8), (10,)], column_linear),
    "row": ([(6, 8), (10, 8), (10,)], row_linear),
}
# Those that torch differentiates again: products, and on the CPU glu and attention.
AGAIN = {"column", "row", "glu", "attention"}


def leaves(name: str, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, device=device).requires_grad_() for shape in CASES[name][0]]


@pytest.mark.parametrize("name", [name for name in CASES if name not in AGAIN])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_gradient_penalty_is_refused(name: str, backend: str, monkeypatch) -> None:
    """And not left out, where it is a part of a loss that has a gradient besides."""
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", backend)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = leaves(name, device)
    value = CASES[name][1](*tensors).sum()
    gradients = torch.autograd.grad(value, tensors, create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in gradients)
    with pytest.raises(RuntimeError, match=r"has no (second derivative|gradient by itself)"):
        (value + penalty).backward()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tensors_without_memory(name: str, backend: str, monkeypatch) -> None:
    """As torch counts a model's FLOPs, or finds out its shapes."""
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", backend)
    real, tensors = leaves(name, "cpu"), leaves(name, "meta")
    expected, result = (CASES[name][1](*each) for each in (real, tensors))
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    assert result.is_meta
    result.sum().backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in tensors)
