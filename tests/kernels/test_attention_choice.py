"""Which attention is chosen where, and what the libraries are handed."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from nanotron_fast.kernels import attention as attention_module
from nanotron_fast.kernels.attention import (
    attention,
    attention_backward,
    attention_forward,
    explain,
)
from nanotron_fast.kernels.attention import library as attention_library
from nanotron_fast.kernels.attention.choice import (
    FEWER_QUERIES,
    MORE_QUERIES,
    PREFERENCE,
    Request,
    choose_backend,
)
from nanotron_fast.kernels.attention.reference import attention_reference


def choose(present=PREFERENCE, **request) -> str:
    """The name chosen where only some libraries are present."""
    return choose_backend(
        Request(**request), lambda name: "" if name in present else "is not here"
    )[0]


TORCH = ("sdpa_cudnn", "sdpa_flash", "sdpa_varlen", "triton", "torch")


@pytest.mark.parametrize(
    ("expected", "present", "request_"),
    [
        ("flash_attn_3", PREFERENCE, {}),
        ("sdpa_cudnn", PREFERENCE, {"architecture": 100}),
        ("flash_attn_2", PREFERENCE, {"architecture": 80}),
        ("sdpa_cudnn", TORCH, {}),
        ("sdpa_flash", TORCH, {"architecture": 80}),
        ("sdpa_flash", TORCH, {"head_dim": 192}),
        ("sdpa_varlen", TORCH, {"has_documents": True}),
        ("sdpa_varlen", TORCH, {"has_window": True}),
        ("triton", TORCH, {"has_softcap": True}),
        ("flash_attn_3", PREFERENCE, {"has_softcap": True, "has_documents": True}),
        ("triton", PREFERENCE, {"has_softcap": True, "wants_lse": True}),
        ("sdpa_cudnn", PREFERENCE, {"wants_lse": True}),
        ("triton", PREFERENCE, {"dtype": torch.float32}),
        ("torch", PREFERENCE, {"dtype": torch.float32, "head_dim": 136}),
        ("torch", PREFERENCE, {"dtype": torch.float64}),
        ("torch", PREFERENCE, {"head_dim": 264}),
        ("triton", PREFERENCE, {"head_dim": 20}),
        ("triton", TORCH, {"architecture": 89, "head_dim": 256}),
        ("sdpa_flash", TORCH, {"architecture": 89, "head_dim": 256, "is_training": False}),
        ("torch", PREFERENCE, {"architecture": 75}),
        ("flash_attn_2", PREFERENCE, {"is_deterministic": True}),
        ("sdpa_flash", TORCH, {"is_deterministic": True}),
        ("sdpa_varlen", TORCH, {"lengths": FEWER_QUERIES}),
        ("sdpa_cudnn", TORCH, {"lengths": FEWER_QUERIES, "causal": False}),
        ("triton", PREFERENCE, {"lengths": MORE_QUERIES}),
        ("sdpa_cpu", PREFERENCE, {"device_type": "cpu", "dtype": torch.float64}),
        ("torch", PREFERENCE, {"device_type": "cpu", "has_softcap": True}),
        ("torch", PREFERENCE, {"device_type": "mps"}),
        ("torch", PREFERENCE, {"environment": "torch", "device_type": "cpu"}),
        ("torch", PREFERENCE, {"environment": "torch"}),
        ("triton", PREFERENCE, {"environment": "triton"}),
        ("triton", PREFERENCE, {"environment": "triton", "device_type": "cpu"}),
        ("torch", PREFERENCE, {"environment": "triton", "dtype": torch.float64}),
        ("sdpa_cudnn", PREFERENCE, {"environment": "torch", "backend": "sdpa"}),
        ("flash_attn_2", PREFERENCE, {"backend": "flash_attn", "architecture": 80}),
        ("flash_attn_2", PREFERENCE, {"backend": "flash_attn_2"}),
        ("triton", PREFERENCE, {"backend": "triton"}),
        (
            "triton",
            PREFERENCE,
            {
                "backend": "triton",
                "device_type": "cpu",
                "dtype": torch.float16,
                "is_interpreting": True,
            },
        ),
        ("torch", PREFERENCE, {"environment": "triton", "is_interpreting": True}),
        ("torch", PREFERENCE, {"backend": "torch"}),
    ],
)
def test_choice(expected, present, request_) -> None:
    assert choose(present, **request_) == expected


@pytest.mark.parametrize(
    ("message", "request_"),
    [
        ("backend='cudnn': choose auto, sdpa, flash_attn, flash_attn_3", {"backend": "cudnn"}),
        ("sdpa_varlen cannot do a softcap", {"backend": "sdpa", "has_softcap": True}),
        ("triton needs a GPU, not tensors on cpu", {"backend": "triton", "device_type": "cpu"}),
        ("flash_attn_3 is for sm_90", {"backend": "flash_attn_3", "architecture": 80}),
        ("flash_attn_2 takes no torch.float32", {"backend": "flash_attn", "dtype": torch.float32}),
        ("triton takes head_dim up to 256", {"backend": "triton", "head_dim": 320}),
        ("more queries than keys", {"backend": "flash_attn", "lengths": MORE_QUERIES}),
        (
            "triton takes no torch.bfloat16 in Triton's interpreter, which gets its products wrong",
            {"backend": "triton", "is_interpreting": True},
        ),
        ("sdpa_flash needs a GPU, and there is none", {"backend": "sdpa", "architecture": 0}),
    ],
)
def test_what_cannot_be_served_is_refused(message, request_) -> None:
    with pytest.raises(ValueError, match=message):
        choose(**request_)


def test_what_is_not_installed_is_refused() -> None:
    with pytest.raises(ValueError, match="flash_attn_2 is not here"):
        choose(("torch",), backend="flash_attn")


def test_the_reason_names_what_was_passed_over() -> None:
    name, reason = choose_backend(Request(), lambda name: "is away" if "flash" in name else "")
    assert name == "sdpa_cudnn"
    assert reason == "first of the published order (flash_attn_3 is away)"


def test_explain_follows_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "auto")
    assert explain("cpu") == ("sdpa_cpu", "tensors on cpu")
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "triton")
    assert explain("cpu", dtype=torch.float32) == ("triton", "NANOTRON_FAST_BACKEND=triton")
    name, reason = explain("cpu", dtype=torch.float64)
    assert name == "torch"
    assert "takes no torch.float64" in reason


def test_an_explicit_backend_that_cannot_is_refused_by_the_call() -> None:
    q = torch.randn(1, 4, 2, 16)
    with pytest.raises(ValueError, match="sdpa_cudnn needs a GPU, not tensors on cpu"):
        attention(q, q, q, backend="sdpa")
    torch.testing.assert_close(attention(q, q, q, backend="torch"), attention_reference(q, q, q))


def flash_module(name: str, extension: str | None) -> ModuleType:
    """A module with flash-attn's functions, which compute by the reference and note their calls."""
    module = ModuleType(name)
    module.calls = []
    if extension is not None:
        module.flash_attn_gpu = ModuleType(extension)

    def flash_attn_func(
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        deterministic=False,
        **others,
    ):
        module.calls.append(others)
        left, right = window_size
        assert right == (0 if causal else -1)
        return attention_reference(
            q,
            k,
            v,
            causal=causal,
            cu_seqlens=others.get("cu_seqlens_q"),
            window=left + 1 if left >= 0 else None,
            scale=softmax_scale,
            softcap=softcap or None,
        )

    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = flash_attn_func
    return module


@pytest.fixture
def fresh():
    """Forgets what is installed, before and after."""
    attention_library.missing.cache_clear()
    attention_module._decided.cache_clear()
    attention_module._settled.clear()
    yield
    attention_library.missing.cache_clear()
    attention_module._decided.cache_clear()
    attention_module._settled.clear()


def install(monkeypatch, module: ModuleType) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", module)


def test_a_stand_in_for_flash_attn_is_not_taken_for_it(monkeypatch, fresh) -> None:
    install(monkeypatch, flash_module("flash_attn.flash_attn_interface", None))
    assert "is a stand-in" in attention_library.missing("flash_attn_2")


def test_an_old_flash_attn_is_too_old(monkeypatch, fresh) -> None:
    module = flash_module("flash_attn.flash_attn_interface", "flash_attn_2_cuda")
    module.flash_attn_varlen_func = lambda q, k, v, softmax_scale, causal, window_size: None
    install(monkeypatch, module)
    assert attention_library.missing("flash_attn_2").endswith("takes no softcap")


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 3, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("has_documents", [False, True])
def test_flash_attn_is_handed_the_options(monkeypatch, fresh, options, has_documents) -> None:
    module = flash_module("flash_attn.flash_attn_interface", "flash_attn_2_cuda")
    install(monkeypatch, module)
    assert attention_library.missing("flash_attn_2") == ""
    shape = (9,) if has_documents else (2, 9)
    q, k, v = (torch.randn(*shape, heads, 16) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32) if has_documents else None
    options = {"cu_seqlens": cu_seqlens, "causal": True, "window": None, "softcap": None} | options
    out = attention_library.attend("flash_attn_2", q, k, v, max_seqlen=5, scale=0.3, **options)
    torch.testing.assert_close(out, attention_reference(q, k, v, scale=0.3, **options))
    assert len(module.calls) == 1
    if has_documents:
        assert module.calls[0]["max_seqlen_q"] == module.calls[0]["max_seqlen_k"] == 5


@pytest.mark.parametrize("causal", [True, False])
def test_torch_sdpa_is_handed_the_options(causal) -> None:
    q, k, v = (torch.randn(2, 9, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    options = {"causal": causal, "scale": 0.3}

    def by_library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_library.attend(
            "sdpa_flash",
            q,
            k,
            v,
            cu_seqlens=None,
            max_seqlen=None,
            window=None,
            softcap=None,
            **options,
        )

    out = by_library(q, k, v)
    expected = attention_reference(q, k, v, **options)
    torch.testing.assert_close(out, expected)
    compiled = torch.compile(by_library, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), expected)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    for a, b in zip(grads, torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("has_documents", [False, True])
def test_varlen_attn_is_handed_the_options(monkeypatch, has_documents, window) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert enable_gqa
        assert (max_q, max_k) == (9, 9)
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert torch.equal(cu_q, cu_k)
        assert window_size == (-1 if window is None else 3, 0)
        return attention_reference(q, k, v, cu_seqlens=cu_q, window=window, scale=scale)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    shape = (9,) if has_documents else (2, 9)
    q, k, v = (torch.randn(*shape, heads, 16) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32) if has_documents else None
    options = {"cu_seqlens": cu_seqlens, "causal": True, "window": window, "scale": 0.3}
    out = attention_library.attend("sdpa_varlen", q, k, v, max_seqlen=9, softcap=None, **options)
    torch.testing.assert_close(out, attention_reference(q, k, v, **options))


@pytest.mark.parametrize(
    ("name", "has_documents", "window"),
    [
        ("sdpa_cudnn", False, None),
        ("sdpa_flash", False, None),
        ("sdpa_varlen", False, 4),
        ("sdpa_varlen", True, None),
    ],
)
def test_kernels_of_torch_take_what_they_are_called_with(name, has_documents, window) -> None:
    # On meta tensors: signatures and shapes, no values.
    def make(heads: int) -> Tensor:
        shape = (64, heads, 32) if has_documents else (2, 64, heads, 32)
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    q, k, v = make(8), make(2), make(2)
    cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta") if has_documents else None
    options = {
        "cu_seqlens": cu_seqlens,
        "max_seqlen": 40 if has_documents else None,
        "causal": True,
        "window": window,
        "scale": 0.2,
    }
    out, lse = attention_library.forward(name, q, k, v, **options)
    assert out.shape == q.shape
    assert lse.shape == ((8, 64) if has_documents else (2, 8, 64))
    grads = attention_library.backward(name, make(8), q, k, v, out, lse, **options)
    assert [t.shape for t in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("is_sequence_first", [False, True])
def test_cudnn_is_given_all_as_it_gives_it(monkeypatch, batch, is_sequence_first) -> None:
    """What only a GPU would say, and in part would not.

    Its graph of the backward pass refuses statistics of three dimensions, and the graph of one
    call serves another whose dout and out have other strides.
    """

    def make(heads: int, is_first: bool) -> Tensor:
        shape = (64, batch, heads, 32) if is_first else (batch, 64, heads, 32)
        made = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        return made.transpose(0, 1) if is_first else made

    q, k, v = make(12, is_sequence_first).split((8, 2, 2), dim=2)
    options = {"cu_seqlens": None, "max_seqlen": None, "causal": True, "window": None, "scale": 0.2}
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    expected, stats, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads_first, None, True
    )
    out, lse = attention_library.forward("sdpa_cudnn", q, k, v, **options)
    given, states = [], set()

    def backward(dout, q, k, v, out, lse, *rest, scale):
        given.append((lse.shape, lse.stride(), dout.stride(), out.stride()))
        states.update(each.dtype for each in rest[:2])
        return q, k, v

    monkeypatch.setattr(
        torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward", backward, raising=False
    )
    # By whichever implementation, and of any strides.
    by_token = torch.empty(batch, 64, 8, device="meta").transpose(1, 2)
    by_head = torch.empty(batch, 8, 64, 32, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    others = (by_head, make(8, True), make(8, False))
    for each_lse in (lse, by_token):
        for dout, each_out in (
            (out, out),
            *((x, out) for x in others),
            *((out, x) for x in others),
        ):
            attention_library.backward("sdpa_cudnn", dout, q, k, v, each_out, each_lse, **options)
    strides = expected.stride()
    if batch == 1:  # whose own stride is of no dimension that has a second element
        given = [(*of_lse, dout[1:], out[1:]) for *of_lse, dout, out in given]
        strides = strides[1:]
    assert given == [(stats.shape, stats.stride(), strides, strides)] * 14
    assert states == {torch.int64}  # which torch would cast it to for sm_100


def test_cudnn_gets_gradients_as_it_gives_the_result(monkeypatch) -> None:
    given = []

    class Sdpa(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            return torch.empty_like(q).copy_(q)

        @staticmethod
        def backward(ctx, dout):
            given.append((dout.stride(), dout.clone()))
            return dout.clone(), None, None

    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **_: Sdpa.apply(q, k, v),
    )
    q = torch.randn(2, 64, 8, 32, requires_grad=True)
    k = v = torch.randn(2, 64, 2, 32)
    options = {"max_seqlen": None, "causal": True, "window": None, "scale": 0.2, "softcap": None}
    by_head, by_token = torch.randn(2, 8, 64, 32), torch.randn(2, 64, 8, 32)
    for name in ("sdpa_cudnn", "sdpa_flash"):
        for dout in (by_token, by_head.transpose(1, 2)):
            out = attention_library.attend(name, q, k, v, cu_seqlens=None, **options)
            out.backward(dout)
            assert torch.equal(given[-1][1], dout.transpose(1, 2))
    strides = q.transpose(1, 2).stride()
    assert [each for each, _ in given] == [strides, strides, strides, by_head.stride()]


def test_heads_that_cannot_be_loaded_16_bytes_at_a_time_are_copied() -> None:
    whole = torch.randn(2, 64, 8, 40).bfloat16()
    for fit in (whole, whole[..., 8:], whole[:, :, ::2, :32], whole.transpose(0, 1)):
        assert attention_library._vectors(fit) is fit
    for other in (
        whole[..., 1:33],
        whole[..., ::2],
        whole[..., :36].contiguous()[..., 1:],
        whole.mT,
    ):
        copied = attention_library._vectors(other)
        assert copied is not other
        assert copied.is_contiguous()
        assert torch.equal(copied, other)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_forward_and_backward_record_nothing(backend: str) -> None:
    q, k, v = (torch.randn(1, 9, 2, 16, requires_grad=True) for _ in range(3))
    out, lse = attention_forward(q, k, v, backend=backend)
    grads = attention_backward(out, q, k, v, out, lse, backend=backend)
    assert torch.is_grad_enabled()
    assert not any(each.requires_grad for each in (out, lse, *grads))


@pytest.mark.parametrize("length", [1, 2])
def test_a_single_key_is_not_given_to_cudnn(monkeypatch, length: int) -> None:
    shapes = [(2, length, heads, 32) for heads in (8, 2, 2)]
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
    options = {"cu_seqlens": None, "max_seqlen": None, "causal": True, "window": None, "scale": 0.2}
    taken = []
    for name in (
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_cudnn_attention_backward",
        "_flash_attention_forward",
        "_flash_attention_backward",
    ):
        operator = getattr(torch.ops.aten, name)

        def take(*given, name=name, operator=operator, **named):
            taken.append("cudnn" in name)
            return operator(*given, **named)

        monkeypatch.setattr(torch.ops.aten, name, take)
    out, lse = attention_library.forward("sdpa_cudnn", q, k, v, **options)
    assert lse.shape == (2, 8, length)
    grads = attention_library.backward("sdpa_cudnn", out, q, k, v, out, lse, **options)
    assert [t.shape for t in grads] == [q.shape, k.shape, v.shape]
    assert taken == [length > 1] * 2


def test_flash_is_given_lse_as_it_gives_it(monkeypatch) -> None:
    """It reads the address and asks for no strides: what lies otherwise would be read wrongly."""
    q, k, v = (torch.empty(2, 64, n, 32, dtype=torch.bfloat16, device="meta") for n in (8, 2, 2))
    options = {"cu_seqlens": None, "max_seqlen": None, "causal": True, "window": None, "scale": 0.2}
    given = []

    def backward(dout, q, k, v, out, lse, *rest, **named):
        given.append((lse.shape, lse.stride()))
        assert [each.dtype for each in rest[-2:]] == [torch.uint64] * 2
        return q, k, v

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward, raising=False)
    by_token = torch.empty(2, 64, 8, device="meta").transpose(1, 2)
    attention_library.backward("sdpa_flash", q, q, k, v, q, by_token, **options)
    assert given == [((2, 8, 64), (8 * 64, 64, 1))]
