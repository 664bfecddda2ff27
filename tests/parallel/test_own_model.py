"""What a model of a user's own may do with our operations, beside training with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanotron_fast.kernels.attention import attention
from nanotron_fast.kernels.attention.sinks import attention_with_sinks
from nanotron_fast.kernels.embedding import vocab_parallel_embedding
from nanotron_fast.kernels.glu import glu
from nanotron_fast.kernels.linear_cross_entropy import linear_cross_entropy
from nanotron_fast.kernels.rms_norm import rms_norm
from nanotron_fast.parallel import (
    column_linear,
    row_linear,
    tensor_parallel_attention,
    tensor_parallel_mlp,
)
from nanotron_fast.parallel.grouped import Runs, grouped_linear
from nanotron_fast.patch.nanotron.attention_with_lse import attention_with_lse
from nanotron_fast.patch.transformers.forwards import _GatedProducts

HEADS = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 8}


def loss(hidden: Tensor, weight: Tensor, **options) -> Tensor:
    target = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    return linear_cross_entropy(hidden, weight, target, **options)


def embedding(weight: Tensor) -> Tensor:
    return vocab_parallel_embedding(torch.arange(4, device=weight.device), weight)


def experts(x: Tensor, weight: Tensor) -> Tensor:
    counts = torch.tensor([4, 2])  # which have values where x has none
    return grouped_linear(x, weight, Runs(counts.cuda() if x.is_cuda else counts))


def gated(*tensors: Tensor) -> Tensor:
    return _GatedProducts.apply(*tensors, "silu")


def whole_attention(x: Tensor, qkv: Tensor, out: Tensor) -> Tensor:
    cos = torch.ones(len(x), 4, device=x.device)
    return tensor_parallel_attention(x, qkv, out, cos, cos, **HEADS)


# Name -> shapes of the tensors, and the operation.
CASES: dict[str, tuple[list[tuple[int, ...]], Callable[..., Tensor]]] = {
    "rms_norm": ([(6, 8), (8,)], rms_norm),
    "glu": ([(6, 8)], glu),
    "attention": ([(1, 6, 2, 8)] * 3, attention),
    "attention with sinks": ([(1, 6, 2, 8)] * 3 + [(2,)], attention_with_sinks),
    "attention with lse": ([(1, 6, 2, 8)] * 3, lambda *qkv: attention_with_lse(*qkv)[0]),
    "loss": ([(6, 8), (12, 8)], loss),
    "loss in chunks": ([(6, 8), (12, 8)], lambda x, w: loss(x, w, chunk_tokens=4)),
    "losses": ([(6, 8), (12, 8)], lambda x, w: loss(x, w, reduction="none")),
    "losses in chunks": (
        [(6, 8), (12, 8)],
        lambda x, w: loss(x, w, reduction="none", chunk_tokens=4),
    ),
    "gated products": ([(6, 8), (8, 8), (8, 8), (8,), (8,)], gated),
    "mlp": ([(6, 8), (16, 8), (8, 8)], tensor_parallel_mlp),
    "attention block": ([(6, 8), (32, 8), (8, 16)], whole_attention),
    "embedding": ([(6, 8)], embedding),
    "experts": ([(6, 8), (2, 8, 10)], experts),
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
@pytest.mark.parametrize("asks_for_all", [True, False])
def test_a_gradient_penalty_is_refused(
    name: str, backend: str, asks_for_all: bool, monkeypatch
) -> None:
    """And not left out, where it is a part of a loss that has a gradient besides."""
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", backend)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = leaves(name, device)
    value = CASES[name][1](*tensors).square().sum()
    gradients = torch.autograd.grad(value, tensors, create_graph=True)
    total = value + sum(gradient.square().sum() for gradient in gradients)
    with pytest.raises(RuntimeError, match=r"has no (second derivative|gradient by itself)"):
        total.backward() if asks_for_all else torch.autograd.grad(total, tensors)


@pytest.mark.parametrize(
    ("name", "after"),
    [
        *((name, torch.square) for name in CASES if name not in AGAIN),
        # An embedding's gradient is then the same whatever its weight is.
        *((name, torch.clone) for name in CASES if name not in {*AGAIN, "embedding"}),
    ],
)
def test_a_gradient_penalty_is_refused_for_each_tensor(
    name: str, after: Callable[[Tensor], Tensor]
) -> None:
    """Where the others have no gradient, and what is asked for leads to the operation.

    Also where the incoming gradient is a number, and does not lead there.
    """
    for place, _ in enumerate(CASES[name][0]):
        tensors = [tensor.detach() for tensor in leaves(name, "cpu")]
        leaf = tensors[place].requires_grad_()
        tensors[place] = leaf * 1
        value = after(CASES[name][1](*tensors)).sum()
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=r"has no (second derivative|gradient by itself)"):
            torch.autograd.grad(gradient.square().sum(), leaf)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_checkpointed", [True, False])
def test_a_graph_of_gradients_changes_none(name: str, is_checkpointed: bool) -> None:
    """Nobody differentiates them: some loops ask for the graph in every step."""
    operation = CASES[name][1]
    if is_checkpointed:
        operation = partial(checkpoint, operation, use_reentrant=False)
    expected, found = (
        torch.autograd.grad(operation(*tensors).square().sum(), tensors, create_graph=asks)
        for asks in (False, True)
        for tensors in [leaves(name, "cpu")]
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("name", ["mlp", "column", "row", "experts", "embedding"])
def test_a_graph_of_gradients_leaves_main_gradients_out(name: str) -> None:
    *others, weight = [tensor for tensor in leaves(name, "cpu") if tensor.dim() > 1]
    weight.main_grad = torch.zeros_like(weight)
    CASES[name][1](*others, weight).square().sum().backward(create_graph=True)
    assert weight.main_grad.any()
    assert not weight.main_grad.requires_grad


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
