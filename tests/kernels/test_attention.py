"""Attention against its fp64 reference, and the choice of a backend."""

from __future__ import annotations

import pytest
import torch

from nanotron_fast.kernels import attention_triton
from nanotron_fast.kernels.attention import (
    attention,
    attention_backward,
    attention_forward,
)
from nanotron_fast.kernels.attention_choice import Request, choose_backend
from nanotron_fast.kernels.attention_reference import attention_reference
from tests.kernels.checks import assert_close, wide


def make(device, dtype, seq_q, seq_k, heads, head_dim, batch=(2,)):
    torch.manual_seed(0)
    num_q, num_k = heads
    q, dout = (torch.randn(*batch, seq_q, num_q, head_dim, device=device) for _ in range(2))
    k, v = (torch.randn(*batch, seq_k, num_k, head_dim, device=device) for _ in range(2))
    return [t.to(dtype) for t in (q, k, v, dout)]


def compare(q, k, v, dout, factor: float = 4, floor: float = 1e-5, **options) -> None:
    """Forward and backward against fp64 on the same rounded inputs.

    Weights, and in backward their gradients, are rounded to the dtype before their products:
    several roundings follow each other. Of a query that sees a single key, or equal ones, the
    gradient cancels: what is left is the round-off of terms of about 1.
    """
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attention(*leaves, **options)
    grads = torch.autograd.grad(out, leaves, dout)
    leaves64 = [wide(t, True) for t in (q, k, v)]
    expected = attention_reference(*leaves64, **options)
    grads64 = torch.autograd.grad(expected, leaves64, wide(dout))
    for ours, reference in zip((out, *grads), (expected, *grads64), strict=True):
        assert ours.dtype == q.dtype
        assert_close(ours, reference, factor=factor, floor=floor)


def written_out(q, k, v, window, softcap):
    """The definition, a query at a time; (seq, heads, d) in fp64."""
    out = torch.zeros_like(q)
    for i in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            first = 0 if window is None else max(0, i - window + 1)
            scores = k[first : i + 1, g] @ q[i, h] * q.shape[-1] ** -0.5
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[i, h] = scores.softmax(0) @ v[first : i + 1, g]
    return out


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 2.0), (2, 1.0)])
def test_the_reference_is_the_definition(window, softcap) -> None:
    q, k, v, _ = make("cpu", torch.float64, 7, 7, (4, 2), 8, batch=())
    options = {"window": window, "softcap": softcap}
    expected = written_out(q, k, v, window, softcap)
    ends = torch.tensor([0, 7], dtype=torch.int32)
    for ours in (
        attention_reference(q[None], k[None], v[None], **options)[0],
        attention_reference(q, k, v, cu_seqlens=ends, **options),
    ):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("seqs", "heads", "head_dim"),
    [
        ((5, 5), (1, 1), 16),
        ((50, 50), (4, 1), 24),
        ((33, 33), (8, 1), 64),
        ((40, 70), (2, 2), 80),
        ((70, 40), (2, 2), 32),
        ((17, 17), (2, 1), 128),
    ],
)
def test_matches_reference(triton_path, seqs, heads, head_dim, causal, dtype) -> None:
    compare(*make(triton_path, dtype, *seqs, heads, head_dim), causal=causal)


@pytest.mark.parametrize("head_dim", [40, 96, 192, 256])
def test_other_head_dims(triton_path, head_dim) -> None:
    compare(*make(triton_path, torch.float16, 20, 20, (2, 1), head_dim, batch=(1,)))


@pytest.mark.parametrize(("window", "softcap"), [(1, None), (9, None), (500, None), (20, 3.0)])
def test_window_and_softcap(path, device, window, softcap) -> None:
    tensors = make(device, torch.float32, 70, 70, (4, 2), 16)
    compare(*tensors, window=window, softcap=softcap, factor=8)


@pytest.mark.parametrize("documents", [[0, 60], [0, 0, 1, 30, 30, 60], [0, 35, 60]])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"causal": False}], ids=str)
def test_documents(path, device, documents, options) -> None:
    tensors = make(device, torch.float32, 60, 60, (4, 2), 16, batch=())
    ends = torch.tensor(documents, dtype=torch.int32, device=device)
    compare(*tensors, cu_seqlens=ends, **options, factor=8)


def test_documents_do_not_see_each_other(triton_path) -> None:
    q, k, v, _ = make(triton_path, torch.float32, 30, 30, (2, 1), 16, batch=())
    ends = torch.tensor([0, 11, 30], dtype=torch.int32, device=triton_path)
    out = attention(q, k, v, cu_seqlens=ends)
    alone = attention(q[None, 11:], k[None, 11:], v[None, 11:])[0]
    torch.testing.assert_close(out[11:], alone)


def test_views_of_a_packed_tensor(triton_path) -> None:
    torch.manual_seed(0)
    packed = torch.randn(2, 30, 8, 16, device=triton_path)
    q, k, v = packed.split([4, 2, 2], dim=2)
    dout = torch.randn(2, 30, 4, 16, device=triton_path)
    compare(q, k, v, dout, factor=8)
    out, lse = attention_forward(q, k, v)
    assert lse.shape == (2, 4, 30)
    grads = attention_backward(dout, q, k, v, out, lse)
    leaves = [wide(t, True) for t in (q, k, v)]
    expected = torch.autograd.grad(attention_reference(*leaves), leaves, wide(dout))
    for ours, reference in zip(grads, expected, strict=True):
        assert_close(ours, reference, factor=8)


def test_extremes(path, device) -> None:
    q, k, v, dout = make(device, torch.float32, 40, 40, (2, 2), 16)
    # Logits of 1e4: their round-off in fp32, 1e-3, is what the weights are off by.
    compare(q * 300, k * 30, v, dout, factor=2000, floor=1e-3)
    compare(torch.ones_like(q), torch.ones_like(k), v, dout, factor=8)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty(path, device, shape) -> None:
    q = torch.randn(*shape, 4, 16, device=device, requires_grad=True)
    k = torch.randn(*shape, 2, 16, device=device)
    out = attention(q, k, k)
    assert out.shape == q.shape
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_saves_inputs_output_and_a_number_a_row(triton_path) -> None:
    q, k, v, _ = make(triton_path, torch.float16, 24, 24, (4, 2), 16)
    q.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        attention(q, k, v)
    sizes = sum(t.numel() * t.element_size() for t in saved)
    assert sizes <= 2 * (2 * q.numel() + 2 * k.numel()) + 4 * 2 * 4 * 24


def test_operators_are_what_torch_expects(triton_path) -> None:
    q, k, v, dout = make(triton_path, torch.float32, 9, 9, (2, 1), 16)
    options = (None, True, None, 0.25, None)
    torch.library.opcheck(attention_triton._forward, (q, k, v, *options))
    out, lse = attention_triton.forward(q, k, v, *options)
    torch.library.opcheck(attention_triton._backward, (dout, q, k, v, out, lse, *options))


def test_compiles_without_a_graph_break(path, device) -> None:
    q, k, v, _ = make(device, torch.float32, 9, 9, (2, 1), 16)
    q.requires_grad_()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    out = compiled(q, k, v, window=3)
    torch.testing.assert_close(out, attention(q, k, v, window=3))
    out.sum().backward()
    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize(
    ("changes", "installed", "name"),
    [
        ({"device_type": "cpu"}, (), "torch"),
        ({}, (), "sdpa_cudnn"),
        ({}, ("flash_attn_3",), "flash_attn_3"),
        ({"architecture": 80}, ("flash_attn_3", "flash_attn_2"), "flash_attn_2"),
        ({"has_softcap": True}, (), "triton"),
        ({"has_softcap": True}, ("flash_attn_2",), "flash_attn_2"),
        ({"has_window": True}, (), "sdpa_varlen"),
        ({"has_documents": True, "has_softcap": True}, (), "triton"),
        ({"dtype": torch.float32}, (), "triton"),
        ({"dtype": torch.float64}, (), "torch"),
        ({"head_dim": 512}, (), "torch"),
        ({"wants_lse": True}, ("flash_attn_3",), "sdpa_cudnn"),
        ({"environment": "triton"}, (), "triton"),
        ({"environment": "torch"}, (), "torch"),
    ],
)
def test_the_choice(changes, installed, name) -> None:
    def missing(backend: str) -> str:
        has = not backend.startswith("flash_attn") or backend in installed
        return "" if has else "is not installed"

    chosen, reason = choose_backend(Request(**changes), missing)
    assert chosen == name
    assert reason


def test_what_does_not_fit_is_named(device) -> None:
    q, k, v, _ = make(device, torch.float32, 5, 5, (4, 2), 16)
    for call, message in (
        (lambda: attention(q, k[..., :8], v[..., :8]), "do not fit each other"),
        (lambda: attention(q[:, :, :3], k, v), "3 query heads over 2 key heads"),
        (lambda: attention(q, k.half(), v), "one dtype"),
        (lambda: attention(q, k, v, window=0), "window=0"),
        (lambda: attention(q, k, v, window=3, causal=False), "window=3, causal=False"),
        (lambda: attention(q, k, v, softcap=0.0), "softcap=0.0: it must be above 0"),
        (lambda: attention(q, k, v, backend="fast"), "backend='fast': choose auto"),
        (lambda: attention(q, k, v, backend="flash_attn_3"), "cannot serve this"),
        (lambda: attention(q[0], k[0], v[0]), "each has 4 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    ends = torch.tensor([0, 5], device=device)
    with pytest.raises(ValueError, match=r"torch.int64: \(documents \+ 1,\) int32"):
        attention(q[0], k[0], v[0], cu_seqlens=ends)
