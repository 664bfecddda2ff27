"""The fused blocks: real ranks, the kernels' own path, what they save, what they refuse."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nanotron_fast.errors import TopologyError
from nanotron_fast.kernels.rope import rope_tables
from nanotron_fast.parallel import tensor_parallel_attention, tensor_parallel_mlp
from nanotron_fast.parallel.attention import heads_of_rank
from tests.parallel.ranks import run_ranks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS, HIDDEN, INTER = 24, 32, 48
HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16}
ROWS = (4 + 2 * 2) * 16


@pytest.fixture(params=["triton", "torch"])
def path(request, monkeypatch) -> str:
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", request.param)
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree_with_the_whole(size: int) -> None:
    run_ranks("tests.parallel.block_ranks", size)


def mlp_tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((TOKENS, HIDDEN), (2 * INTER, HIDDEN), (HIDDEN, INTER))
    return [(torch.randn(shape) * 0.3).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def attention_tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((TOKENS, HIDDEN), (ROWS, HIDDEN), (HIDDEN, 64))
    return [(torch.randn(shape) * 0.3).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def saved_bytes(function) -> int:
    """Bytes that a call keeps for backward, beyond its parameters; storage shared counts once."""
    saved = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            saved[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        function()
    return sum(saved.values())


@pytest.mark.parametrize("fused", ["never", "always"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_mlp(path, monkeypatch, fused, recompute, activation) -> None:
    monkeypatch.setenv("NANOTRON_FAST_FUSED_MATMUL", fused)
    x, gate_up, down = mlp_tensors(torch.float32)
    y = tensor_parallel_mlp(x, gate_up, down, activation=activation, recompute=recompute)
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, gate_up, down), dy)
    leaves = [t.detach().double().requires_grad_() for t in (x, gate_up, down)]
    expected = plain_mlp(*leaves, activation)
    reference = torch.autograd.grad(expected, leaves, dy.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def plain_mlp(x, gate_up, down, activation="silu"):
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return F.linear(act * up, down)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_the_mlp_saves(path, recompute) -> None:
    """x alone (2 bytes a value); and gate_up where it is not computed again."""
    x, gate_up, down = (torch.nn.Parameter(t) for t in mlp_tensors(torch.float16))
    hidden = x.detach().requires_grad_()
    bound = TOKENS * HIDDEN * 2 + (0 if recompute else TOKENS * 2 * INTER * 2)
    assert (
        saved_bytes(lambda: tensor_parallel_mlp(hidden, gate_up, down, recompute=recompute))
        == bound
    )


@pytest.mark.parametrize("fused", ["never", "always"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("documents", [None, [0, 5, 5, 24]])
def test_attention(path, monkeypatch, fused, recompute, interleaved, documents) -> None:
    monkeypatch.setenv("NANOTRON_FAST_FUSED_MATMUL", fused)
    x, weight, o_weight = attention_tensors(torch.float32)
    cos, sin = rope_tables(16, TOKENS, device=DEVICE)
    cu_seqlens = torch.tensor(documents, dtype=torch.int32, device=DEVICE) if documents else None
    options = {**HEADS, "cu_seqlens": cu_seqlens, "interleaved": interleaved}
    y = tensor_parallel_attention(x, weight, o_weight, cos, sin, **options, recompute=recompute)
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, weight, o_weight), dy)
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, o_weight)]
    expected = plain_attention(*leaves, cos, sin, documents or [0, TOKENS], interleaved)
    reference = torch.autograd.grad(expected, leaves, dy.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def plain_attention(x, weight, o_weight, cos, sin, edges, interleaved, bias=None):
    """Written out from the definition, one document after another."""
    outs = []
    for a, b in itertools.pairwise(edges):
        q, k, v = F.linear(x[a:b], weight, bias).view(b - a, 8, 16).split([4, 2, 2], dim=1)
        c, s = cos[: b - a, None].double(), sin[: b - a, None].double()

        def rotate(t, c=c, s=s):
            if interleaved:
                p, q = t[..., 0::2], t[..., 1::2]
                return torch.stack([p * c - q * s, q * c + p * s], -1).flatten(-2)
            p, q = t.chunk(2, -1)
            return torch.cat([p * c - q * s, q * c + p * s], -1)

        q, k = rotate(q), rotate(k)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / 4
        mask = torch.ones(b - a, b - a, dtype=torch.bool).tril()
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
    return F.linear(torch.cat(outs), o_weight)


@pytest.mark.parametrize("recompute", [False, True])
def test_attention_over_tokens_that_are_sequence_first(path, recompute) -> None:
    """The same rows in another order, there and back."""
    x, weight, o_weight = attention_tensors(torch.float32)
    cos, sin = rope_tables(16, TOKENS, device=DEVICE)
    options = {**HEADS, "batch": 3, "recompute": recompute}
    y = tensor_parallel_attention(x, weight, o_weight, cos, sin, **options)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, weight, o_weight), dy)

    def turned(rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(0, (3, TOKENS // 3)).transpose(0, 1).flatten(0, 1)

    ours = tensor_parallel_attention(
        turned(x), weight, o_weight, cos, sin, **options, sequence_first=True
    )
    torch.testing.assert_close(ours, turned(y))
    gradients = torch.autograd.grad(ours, (x, weight, o_weight), turned(dy))
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_positions_that_are_given_pass_over_documents(path) -> None:
    x, weight, o_weight = attention_tensors(torch.float32)
    cos, sin = rope_tables(16, TOKENS, device=DEVICE)
    cu_seqlens = torch.tensor([0, 5, TOKENS], dtype=torch.int32, device=DEVICE)
    options = {**HEADS, "cu_seqlens": cu_seqlens}
    counted = torch.cat((torch.arange(5), torch.arange(TOKENS - 5))).to(DEVICE)
    arguments = (x, weight, o_weight, cos, sin)
    expected = tensor_parallel_attention(*arguments, **options)
    given = tensor_parallel_attention(*arguments, **options, position_ids=counted)
    torch.testing.assert_close(given, expected, rtol=0, atol=0)
    found: list[torch.Tensor] = []
    y = tensor_parallel_attention(*arguments, **options, lse_to=found.append)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    [lse] = found
    assert lse.shape == (4, TOKENS)
    assert not lse.requires_grad
    # Rotary embedding is relative: a document whose positions all move by the same is the same.
    moved = tensor_parallel_attention(
        *arguments, **options, position_ids=torch.arange(TOKENS, device=DEVICE)
    )
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)
    backwards = counted.flip(0)
    turned = tensor_parallel_attention(*arguments, **options, position_ids=backwards)
    assert (turned - expected).abs().max() > 1e-3
    for dtype in (torch.uint8, torch.int16):
        narrow = tensor_parallel_attention(*arguments, **options, position_ids=backwards.to(dtype))
        assert torch.equal(narrow, turned)
    for wrong in (counted[:3], counted.float()):
        message = rf"position_ids \({len(wrong)},\) {wrong.dtype} for 24 tokens"
        with pytest.raises(ValueError, match=message):
            tensor_parallel_attention(*arguments, **options, position_ids=wrong)


class _Copies(TorchDispatchMode):
    """Copies of tensors of heads, (..., heads, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_copy = function in (torch.ops.aten.copy_.default, torch.ops.aten.clone.default)
        if is_copy and args[0].dim() > 2:
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("documents", [None, [0, 5, TOKENS]])
def test_no_gradient_of_heads_is_copied(monkeypatch, documents) -> None:
    """The pass that turns dq and dk back packs all three: on a GPU nothing else moves them."""
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "triton")
    x, weight, o_weight = attention_tensors(torch.float32)
    cos, sin = rope_tables(16, TOKENS, device=DEVICE)
    cu_seqlens = torch.tensor(documents, dtype=torch.int32, device=DEVICE) if documents else None
    batch = 1 if documents else 3
    y = tensor_parallel_attention(
        x, weight, o_weight, cos, sin, **HEADS, cu_seqlens=cu_seqlens, batch=batch
    )
    with _Copies() as copies:
        y.sum().backward()
    assert copies.shapes == []


@pytest.mark.parametrize("recompute", [False, True])
def test_what_attention_saves(path, recompute) -> None:
    """x, attention's output, its log-sum-exp in fp32; QKV where it is not computed again."""
    x, weight, o_weight = attention_tensors(torch.float16)
    hidden = x.detach().requires_grad_()
    weight, o_weight = torch.nn.Parameter(weight), torch.nn.Parameter(o_weight)
    cos, sin = rope_tables(16, TOKENS, device=DEVICE)
    bound = TOKENS * (HIDDEN * 2 + 64 * 2 + 4 * 4) + (0 if recompute else TOKENS * ROWS * 2)
    tables = (cos.numel() + sin.numel()) * 4
    assert (
        saved_bytes(
            lambda: tensor_parallel_attention(
                hidden, weight, o_weight, cos, sin, **HEADS, recompute=recompute
            )
        )
        <= bound + tables
    )


# In bf16 a product on a GPU reads bf16 and adds to fp32; what comes before it is rounded to bf16.
MAIN_GRADS = [
    pytest.param(torch.float32, 1e-4, id="fp32"),
    pytest.param(
        torch.bfloat16,
        2e-2,
        id="bf16",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


def assert_added_to(block, x, parameters, plain, tolerance: float) -> None:
    """Two steps add their gradients to main gradients that begin as ones, and leave no others."""
    for parameter in parameters:
        parameter.main_grad = torch.ones_like(parameter, dtype=torch.float32)
    leaves = [t.detach().double().requires_grad_() for t in (x, *parameters)]
    for _ in range(2):
        y = block()
        dy = torch.randn_like(y)
        y.backward(dy)
        plain(*leaves).backward(dy.double())
    assert all(parameter.grad is None for parameter in parameters)
    ours = [x.grad, *(parameter.main_grad - 1 for parameter in parameters)]
    for mine, leaf in zip(ours, leaves, strict=True):
        error = (mine.double() - leaf.grad).norm() / leaf.grad.norm()
        assert error < tolerance, f"{tuple(leaf.shape)}: {error:.2e}"


@pytest.mark.parametrize("fused", ["never", "always"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), MAIN_GRADS)
def test_the_mlp_adds_to_main_gradients(path, monkeypatch, fused, recompute, dtype, tolerance):
    monkeypatch.setenv("NANOTRON_FAST_FUSED_MATMUL", fused)
    x, gate_up, down = mlp_tensors(dtype)

    def block() -> torch.Tensor:
        return tensor_parallel_mlp(x, gate_up, down, recompute=recompute)

    assert_added_to(block, x, [gate_up, down], plain_mlp, tolerance)


@pytest.mark.parametrize("fused", ["never", "always"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), MAIN_GRADS)
def test_attention_adds_to_main_gradients(path, monkeypatch, fused, recompute, dtype, tolerance):
    monkeypatch.setenv("NANOTRON_FAST_FUSED_MATMUL", fused)
    x, weight, o_weight = attention_tensors(dtype)
    bias = torch.randn(ROWS).to(DEVICE, dtype).requires_grad_()
    cos, sin = rope_tables(16, TOKENS, device=DEVICE)

    def block() -> torch.Tensor:
        return tensor_parallel_attention(
            x, weight, o_weight, cos, sin, **HEADS, qkv_bias=bias, recompute=recompute
        )

    def plain(x, weight, bias, o_weight) -> torch.Tensor:
        return plain_attention(x, weight, o_weight, cos, sin, [0, TOKENS], False, bias)

    assert_added_to(block, x, [weight, bias, o_weight], plain, tolerance)


@pytest.mark.parametrize(("activation", "recompute"), [("silu", False), ("gelu_tanh", True)])
def test_blocks_compile_without_a_graph_break(path, activation, recompute) -> None:
    mlp = partial(tensor_parallel_mlp, activation=activation, recompute=recompute)
    assert_compiles(mlp, mlp_tensors(torch.float32))
    cos, sin = rope_tables(16, TOKENS, device=DEVICE)

    def attention(x: torch.Tensor, weight: torch.Tensor, o_weight: torch.Tensor) -> torch.Tensor:
        options = {**HEADS, "recompute": recompute}
        return tensor_parallel_attention(x, weight, o_weight, cos, sin, **options)

    assert_compiles(attention, attention_tensors(torch.float32))


def assert_compiles(block: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
    """In one graph each way, with the same results."""
    torch.compiler.reset()  # a graph of the other path would serve
    found = []
    for call in (torch.compile(block, fullgraph=True, backend="aot_eager"), block):
        y = call(*tensors)
        found.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_gradient_of_the_attention_blocks_gradient_is_refused(path, recompute) -> None:
    """It went through the products alone, so that the weights' was wrong in silence."""
    given = [each.detach().requires_grad_() for each in attention_tensors(torch.float32)]
    y = tensor_parallel_attention(
        *given, *rope_tables(16, TOKENS, device=DEVICE), **HEADS, recompute=recompute
    )
    (dx,) = torch.autograd.grad(y.square().sum(), given[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="attention has no second derivative"):
        dx.square().sum().backward()


def test_heads_of_a_rank() -> None:
    assert heads_of_rank(8, 4, 2) == (4, 2)
    assert heads_of_rank(8, 2, 4) == heads_of_rank(8, 1, 4) == (2, 1)
    for numbers, message in (
        ((6, 2, 4), "num_q_heads 6 does not split over tp=4"),
        ((12, 3, 2), "num_kv_heads 3 does not split over tp=2"),
        ((12, 3, 4), "4 ranks cannot have equally many copies"),
    ):
        with pytest.raises(TopologyError, match=message):
            heads_of_rank(*numbers)


def test_what_does_not_fit_is_named() -> None:
    x, gate_up, down = mlp_tensors(torch.float32)
    with pytest.raises(ValueError, match=r"gate_up_weight \(48, 32\), down_weight \(32, 48\)"):
        tensor_parallel_mlp(x, gate_up[:INTER], down)
    for wrong in (down[:5], down[0]):
        with pytest.raises(ValueError, match=r"should be .*, \(hidden, inter\)"):
            tensor_parallel_mlp(x, gate_up, wrong)
    x, weight, o_weight = attention_tensors(torch.float32)
    tables = rope_tables(16, TOKENS, device=DEVICE)
    for wrong in ((weight[:64], o_weight), (weight, o_weight[:5]), (weight, o_weight[0])):
        with pytest.raises(ValueError, match=r"they should be \(tokens, hidden\), \(128, hidden\)"):
            tensor_parallel_attention(x, *wrong, *tables, **HEADS)
    for options, message in (
        ({"batch": 5}, "batch 5 for 24 tokens"),
        ({"batch": 0}, "batch 0 for 24 tokens"),
        ({"qkv_bias": weight[0, :1]}, r"qkv_bias \(1,\)"),
        ({"cu_seqlens": torch.zeros(1, 2, dtype=torch.int32)}, r"cu_seqlens \(1, 2\)"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, r"cu_seqlens \(0,\)"),
    ):
        with pytest.raises(ValueError, match=f"tensor_parallel_attention: .*{message}"):
            tensor_parallel_attention(x, weight, o_weight, *tables, **HEADS, **options)
    assert issubclass(TopologyError, ValueError)
