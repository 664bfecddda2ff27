"""Attention with sinks beside the formula, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nanotron_fast.kernels.attention import attention
from nanotron_fast.kernels.attention.sinks import attention_with_sinks

NAMES = ("q", "k", "v", "sinks")
# Relative to the largest value; both sides have the same rounded inputs.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def expected(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None) -> Tensor:
    """Of (batch, seq, heads, d), in fp64."""
    groups = q.shape[2] // k.shape[2]
    k, v = (each.repeat_interleave(groups, 2) for each in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])[None]
    hidden = (distance < 0) | (distance >= (window or q.shape[1]))
    scores = scores.masked_fill(hidden, -math.inf)
    sink = sinks[None, :, None, None].expand(*scores.shape[:-1], 1)
    weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def drawn(dtype: torch.dtype, shape: tuple[int, int, int, int, int]) -> list[Tensor]:
    batch, length, heads, kv_heads, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    sizes: list[tuple[int, ...]] = [
        (batch, length, heads, head_dim),
        (batch, length, kv_heads, head_dim),
        (batch, length, kv_heads, head_dim),
        (heads,),
    ]
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("shape", [(2, 33, 4, 2, 16), (1, 1, 3, 3, 10)], ids=str)
def test_the_formula(
    shape: tuple[int, int, int, int, int], window: int | None, dtype: torch.dtype
) -> None:
    ours = [each.requires_grad_() for each in drawn(dtype, shape)]
    q, k, v, sinks = (each.detach().double().requires_grad_() for each in ours)
    y = attention_with_sinks(ours[0], ours[1], ours[2], ours[3], window=window)
    wanted = expected(q, k, v, sinks, window)
    assert y.dtype == dtype
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(dy)
    wanted.backward(dy.double())
    pairs = [("y", y, wanted)]
    pairs += [(n, a.grad, b.grad) for n, a, b in zip(NAMES, ours, (q, k, v, sinks), strict=True)]
    for name, got, want in pairs:
        scale = max(float(want.detach().abs().max()), 1e-2)
        error = float((got.double() - want).detach().abs().max())
        assert error <= TOLERANCES[dtype] * scale, f"{name}: {error} apart, of {scale}"


def test_documents() -> None:
    q, k, v, sinks = drawn(torch.float32, (1, 30, 4, 2, 16))
    bounds = torch.tensor([0, 11, 11, 30], dtype=torch.int32)
    packed = attention_with_sinks(q[0], k[0], v[0], sinks, cu_seqlens=bounds, max_seqlen=19)
    for first, end in ((0, 11), (11, 30)):
        apart = attention_with_sinks(q[:, first:end], k[:, first:end], v[:, first:end], sinks)
        torch.testing.assert_close(packed[first:end], apart[0], rtol=2e-6, atol=2e-6)


def test_a_sink_without_weight_is_none() -> None:
    q, k, v, _ = drawn(torch.float32, (1, 9, 2, 2, 16))
    none = torch.full((2,), -1e4)
    torch.testing.assert_close(attention_with_sinks(q, k, v, none), attention(q, k, v))


def test_a_gradient_of_the_gradient_is_refused() -> None:
    """That of q, k and v has none, and a sum of the two would be wrong in silence."""
    given = [each.requires_grad_() for each in drawn(torch.float32, (1, 9, 2, 2, 16))]
    y = attention_with_sinks(*given)
    gradients = torch.autograd.grad(y.square().sum(), given, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_with_sinks has no second derivative"):
        sum(each.square().sum() for each in gradients).backward()


@pytest.mark.parametrize("options", [{"scale": -1.0}, {"window": 0}], ids=str)
def test_what_does_not_fit(options: dict[str, Any]) -> None:
    q, k, v, sinks = drawn(torch.float32, (1, 4, 2, 1, 16))
    with pytest.raises(ValueError, match="attention"):
        attention_with_sinks(q, k, v, sinks, **options)
    with pytest.raises(ValueError, match=r"sinks \(1,\) for heads of q \(1, 4, 2, 16\)"):
        attention_with_sinks(q, k, v, sinks[:1])
