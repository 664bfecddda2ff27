"""Attention against its fp64 reference, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton import Config

from nanotron_fast.kernels.attention import (
    attention,
    attention_backward,
    attention_forward,
    attention_reference,
)
from nanotron_fast.kernels.attention import operators as attention_triton
from nanotron_fast.kernels.attention.reference import attention_forward_reference
from tests.kernels.checks import assert_close, wide

# Weights are rounded to the dtype before they meet v, and scores' gradients before q and k.
OUT_FACTOR, GRAD_FACTOR = 2, 4
HALF, SINGLE = torch.float16, torch.float32

# name -> (seq_q or tokens, seq_k or cu_seqlens, H, K, head_dim, dtype, options). Interpreted, a
# block is of 32 queries and 16 keys.
CASES = {
    "causal": (50, 50, 4, 1, 16, SINGLE, {}),
    "two batches": (19, 19, 2, 2, 24, SINGLE, {"causal": False}),
    "window": (75, 75, 2, 1, 64, HALF, {"window": 20}),
    "window of itself": (20, 20, 8, 1, 16, SINGLE, {"window": 1}),
    "window without effect": (20, 20, 1, 1, 16, SINGLE, {"window": 20}),
    "softcap": (40, 40, 2, 2, 80, HALF, {"softcap": 3.0, "scale": 0.3}),
    "fewer queries": (33, 90, 2, 1, 16, SINGLE, {}),
    "fewer queries, window": (18, 70, 2, 1, 16, SINGLE, {"window": 33}),
    "more queries": (70, 33, 2, 1, 16, SINGLE, {}),
    "more queries, not causal": (40, 18, 2, 1, 16, SINGLE, {"causal": False}),
    "one": (1, 1, 1, 1, 40, HALF, {}),
    "head_dim 128": (50, 50, 1, 1, 128, HALF, {}),
    "head_dim 192": (20, 20, 2, 1, 192, HALF, {}),
    "head_dim 256": (33, 33, 1, 1, 256, HALF, {}),
    "documents": (80, [0, 40, 40, 41, 80], 2, 1, 16, SINGLE, {}),
    "documents, not causal": (34, [0, 1, 1, 34], 2, 2, 16, SINGLE, {"causal": False}),
    "documents, all": (60, [0, 33, 33, 34, 60], 2, 1, 24, HALF, {"window": 17, "softcap": 5.0}),
    "documents, few": (9, [0, 4, 4, 9], 2, 1, 16, HALF, {"window": 3, "softcap": 5.0}),
    "tokens after the last document": (50, [0, 20, 20], 1, 1, 16, SINGLE, {}),
    "no document": (20, [0], 1, 1, 16, SINGLE, {}),
}


def make(name: str, device: torch.device) -> tuple[list[Tensor], dict]:
    """q, k, v, dout and the options of a case."""
    torch.manual_seed(0)
    seq_q, seq_k, num_heads, num_kv_heads, head_dim, dtype, options = CASES[name]
    options = dict(options)
    if isinstance(seq_k, list):
        options["cu_seqlens"] = torch.tensor(seq_k, dtype=torch.int32, device=device)
        lead_q = lead_k = (seq_q,)
    else:
        batch = 2 if name == "two batches" else 1
        lead_q, lead_k = (batch, seq_q), (batch, seq_k)
    shapes = [(*lead_q, num_heads), (*lead_k, num_kv_heads), (*lead_k, num_kv_heads)]
    shapes.append(shapes[0])
    return [torch.randn(*s, head_dim, device=device).to(dtype) for s in shapes], options


def run(function, tensors: list[Tensor], options: dict) -> list[Tensor]:
    """out, dq, dk, dv."""
    *inputs, dout = tensors
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves, **options)
    return [out, *torch.autograd.grad(out, leaves, dout)]


def check(ours, tensors: list[Tensor], options: dict, factor: float = 1) -> None:
    reference = run(attention_reference, [wide(t) for t in tensors], options)
    for index, (a, b) in enumerate(zip(ours, reference, strict=True)):
        assert a.dtype == tensors[0].dtype
        # The gradient of a query that sees one key cancels, but for the round-off of its terms.
        assert_close(a, b, factor=factor * (GRAD_FACTOR if index else OUT_FACTOR), floor=2e-6)


def written_out(q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float | None):
    """The definition, a query and a head at a time: (seq, heads, d) in fp64."""
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
    torch.manual_seed(0)
    q, k, v = (torch.randn(7, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    options = {"window": window, "softcap": softcap}
    cu_seqlens = torch.tensor([0, 7], dtype=torch.int32)
    for ours in (
        attention_reference(q[None], k[None], v[None], **options)[0],
        attention_reference(q, k, v, cu_seqlens=cu_seqlens, **options),
    ):
        torch.testing.assert_close(ours, written_out(q, k, v, window, softcap))


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(path, device, name) -> None:
    tensors, options = make(name, device)
    check(run(attention, tensors, options), tensors, options)


@pytest.mark.parametrize("name", CASES)
def test_cpu_tensors_take_torchs_kernels(monkeypatch, name) -> None:
    """Forward, backward and the two apart, with every option that they have."""
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "auto")
    tensors, options = make(name, torch.device("cpu"))
    if "softcap" not in options:
        for reference in ("attention_reference", "attention_forward_reference"):
            monkeypatch.setattr(f"nanotron_fast.kernels.attention.{reference}", None)
    check(run(attention, tensors, options), tensors, options)
    q, k, v, dout = tensors
    out, lse = attention_forward(q, k, v, **options)
    check([out, *attention_backward(dout, q, k, v, out, lse, **options)], tensors, options)
    expected = attention_forward_reference(*(wide(t) for t in (q, k, v)), **options)[1]
    torch.testing.assert_close(lse.double(), expected, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["causal", "fewer queries, window", "documents"])
def test_cpu_attention_compiles_without_a_break(monkeypatch, name) -> None:
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "auto")
    tensors, options = make(name, torch.device("cpu"))
    compiled = torch.compile(
        lambda *qkv: attention(*qkv, **options), fullgraph=True, backend="aot_eager"
    )
    check(run(lambda *qkv, **_: compiled(*qkv), tensors, {}), tensors, options)


@pytest.mark.parametrize("name", ["window", "more queries", "documents"])
def test_forward_and_backward_apart(path, device, name) -> None:
    tensors, options = make(name, device)
    q, k, v, dout = tensors
    out, lse = attention_forward(q, k, v, **options)
    grads = attention_backward(dout, q, k, v, out, lse, **options)
    check([out, *grads], tensors, options)
    _, lse64 = attention_forward_reference(wide(q), wide(k), wide(v), **options)
    assert lse.dtype == torch.float32
    assert torch.equal(lse == float("-inf"), lse64 == float("-inf"))
    seen = lse64 > float("-inf")
    # Logarithms: an error of the scores is one of theirs. Halves are rounded before, not after.
    assert_close(lse[seen], lse64[seen], factor=2)


@pytest.mark.parametrize(("blocks", "tma"), [((16, 32), False), ((64, 16), True)])
def test_blocks_of_other_shapes(triton_path, monkeypatch, blocks, tma) -> None:
    if triton_path.type == "cuda":
        pytest.skip("a GPU runs the configurations that it ships: test_every_configuration")
    config = Config({"BLOCK_M": blocks[0], "BLOCK_N": blocks[1], "TMA": tma})
    monkeypatch.setattr(attention_triton, "INTERPRETED", config)
    for name in ("documents, all", "fewer queries, window"):
        tensors, options = make(name, triton_path)
        check(run(attention, tensors, options), tensors, options)


def test_views_into_a_packed_tensor_are_not_copied(triton_path) -> None:
    torch.manual_seed(0)
    batch, seq, num_heads, num_kv_heads, head_dim = 2, 21, 4, 2, 16
    sizes = [num_heads, num_kv_heads, num_kv_heads]
    heads = sum(sizes)
    packed = torch.randn(batch * seq, heads * head_dim, device=triton_path).half()
    packed.requires_grad_()
    split = packed.view(batch, seq, heads, head_dim).split(sizes, 2)
    dout = torch.randn(batch, seq, num_heads, head_dim, device=triton_path).half()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = attention(*split)
    assert [t.data_ptr() for t in saved[:3]] == [t.data_ptr() for t in split]
    # Beside the packed tensor: out, and 4 bytes for each row of a head.
    own = [t for t in saved if t.untyped_storage().data_ptr() != packed.data_ptr()]
    num_bytes = sum(t.numel() * t.element_size() for t in own)
    assert num_bytes == out.numel() * 2 + batch * num_heads * seq * 4
    (dpacked,) = torch.autograd.grad(out, packed, dout)
    tensors = [*(t.detach() for t in split), dout]
    dsplit = dpacked.view(batch, seq, heads, head_dim).split(sizes, 2)
    check([out, *dsplit], tensors, {})


def test_strides_of_any_kind(triton_path) -> None:
    torch.manual_seed(0)
    q, dout = (torch.randn(1, 3, 20, 16, device=triton_path).transpose(1, 2) for _ in range(2))
    k = torch.randn(1, 20, 3, 32, device=triton_path)[..., ::2]
    v = torch.randn(16, 3, 20, 1, device=triton_path).permute(3, 2, 1, 0)
    dout = dout[:, :1].expand(q.shape)
    check(run(attention, [q, k, v, dout], {}), [q, k, v, dout], {})


@pytest.mark.parametrize("shape", [(0, 5, 5), (1, 0, 0), (1, 0, 5), (1, 5, 0)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_empty(path, device, shape, causal) -> None:
    batch, seq_q, seq_k = shape
    q, dout = (torch.randn(batch, seq_q, 2, 16, device=device) for _ in range(2))
    k, v = (torch.randn(batch, seq_k, 1, 16, device=device) for _ in range(2))
    outs = run(attention, [q, k, v, dout], {"causal": causal})
    assert [t.shape for t in outs] == [q.shape, q.shape, k.shape, v.shape]
    assert all((t == 0).all() for t in outs)
    out, lse = attention_forward(q, k, v, causal=causal)
    assert out.shape == q.shape
    assert lse.shape == (batch, 2, seq_q)


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_ten_thousand(path, device, sign) -> None:
    torch.manual_seed(0)
    # All near 1e4, or -1e4, and apart by about one. 38 rows: the last blocks are not full.
    q, k, v, dout = (torch.randn(1, 38, 2, 16, device=device) for _ in range(4))
    q, k = 100 + q, sign * 25 + 0.01 * k
    out, dq, dk, dv = run(attention, [q, k, v, dout], {})
    reference = run(attention_reference, [wide(t) for t in (q, k, v, dout)], {})
    # Their unit in the last place is 1e-3: weights are off by as much. In dq the keys, all but
    # equal, cancel.
    for ours, expected in ((out, reference[0]), (dk, reference[2]), (dv, reference[3])):
        assert_close(ours, expected, factor=4e-3 / 2e-6)
    assert torch.isfinite(dq).all()
    # One key takes all.
    tensors = [q, k * torch.randn_like(k), v, dout]
    outs = run(attention, tensors, {})
    assert_close(outs[0], attention_reference(*(wide(t) for t in tensors[:3])), factor=4e-3 / 2e-6)
    assert all(torch.isfinite(t).all() for t in outs)


def test_documents_do_not_touch_each_other(path, device) -> None:
    tensors, options = make("documents", device)
    clean = run(attention, tensors, options)
    for tensor in tensors:
        tensor[:40] = float("nan")
    dirty = run(attention, tensors, options)
    for a, b in zip(clean, dirty, strict=True):
        assert b[:40].isnan().all()
        # The reference multiplies what is hidden by 0, and so is spoilt.
        if path == "triton":
            assert torch.equal(a[40:], b[40:])


def test_documents_that_are_a_column_of_a_table(path, device) -> None:
    tensors, options = make("documents", device)
    expected = run(attention, tensors, options)
    bounds = options.pop("cu_seqlens")
    column = torch.stack((bounds, torch.full_like(bounds, 3)), 1)[:, 0]
    for ours, wanted in zip(
        run(attention, tensors, options | {"cu_seqlens": column}), expected, strict=True
    ):
        assert torch.equal(ours, wanted)


def test_the_same_twice(triton_path) -> None:
    tensors, options = make("more queries", triton_path)
    for a, b in zip(*(run(attention, tensors, options) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_operators_are_what_torch_expects(triton_path) -> None:
    (q, k, v, dout), options = make("documents, few", triton_path)
    rest = (options["cu_seqlens"], True, 3, 0.25, None)
    torch.library.opcheck(attention_triton._forward.overload, (q, k, v, *rest))
    out, lse = attention_triton._forward(q, k, v, *rest)
    torch.library.opcheck(attention_triton._backward.overload, (dout, q, k, v, out, lse, *rest))


@pytest.mark.parametrize("name", ["window without effect", "documents, few"])
def test_compiles_without_a_graph_break(path, device, name) -> None:
    tensors, options = make(name, device)
    expected = run(attention, tensors, options)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, tensors, options), expected, strict=True):
        assert_close(a, b.double())
    q, k, v, dout = tensors

    def both(q, k, v):
        out, lse = attention_forward(q, k, v, **options)
        return out, lse, *attention_backward(dout, q, k, v, out, lse, **options)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(q, k, v), both(q, k, v), strict=True):
        assert_close(a, b.double())


def test_what_does_not_fit_is_named(device) -> None:
    q = torch.randn(1, 5, 4, 16, device=device)
    cu_seqlens = torch.zeros(2, dtype=torch.int32, device=device)
    for arguments, options, message in (
        ((q, q[0], q), {}, r"q \(1, 5, 4, 16\), k \(5, 4, 16\).*: each has 4 dimensions"),
        ((q, q, q), {"cu_seqlens": cu_seqlens}, "each has 3 dimensions"),
        ((q, q, q[..., :8]), {}, "do not fit each other"),
        ((q, q[:, :, :3], q[:, :, :3]), {}, "4 query heads over 3 key heads"),
        ((q, q.half(), q), {}, "q torch.float32, k torch.float16, v torch.float32: one dtype"),
        ((q.long(),) * 3, {}, "torch.int64: heads of floating-point values"),
        ((q[..., :0],) * 3, {}, r"v \(1, 5, 4, 0\) torch.float32: heads of floating"),
        ((q[0], q[0, 1:], q[0, 1:]), {"cu_seqlens": cu_seqlens}, "as many queries as keys"),
        ((q[0],) * 3, {"cu_seqlens": cu_seqlens.long()}, r"cu_seqlens \(2,\) torch.int64"),
        ((q, q, q), {"window": 0}, "window=0, causal=True"),
        ((q, q, q), {"window": 2, "causal": False}, "window=2, causal=False"),
        ((q, q, q), {"scale": 0.0}, "scale=0.0: it must be above 0"),
        ((q, q, q), {"softcap": -1.0}, "softcap=-1.0: it must be above 0"),
        ((q, q, q), {"backend": "best"}, "backend='best': choose auto, sdpa"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*arguments, **options)
    with pytest.raises(ValueError, match=r"lse \(1, 5, 4\) for q \(1, 5, 4, 16\)"):
        attention_backward(q, q, q, q, q, q[..., 0])
    lse = q[..., 0].transpose(1, 2)
    for wrong in ((q.half(), q, q, q, q), (q, q, q, q, q.half())):
        with pytest.raises(ValueError, match=r"attention_backward: dout .*torch.float16"):
            attention_backward(*wrong, lse)
