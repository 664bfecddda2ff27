"""The stand-ins for flash_attn and grouped_gemm against their definitions, written out in torch."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanotron_fast.patch import stand_ins
from nanotron_fast.patch.stand_ins.flash_attn import bert_padding
from nanotron_fast.patch.stand_ins.flash_attn import flash_attn_interface as flash
from nanotron_fast.patch.stand_ins.flash_attn.layers import rotary
from nanotron_fast.patch.stand_ins.flash_attn.modules import mha
from nanotron_fast.patch.stand_ins.flash_attn.ops.triton import layer_norm
from nanotron_fast.patch.stand_ins.grouped_gemm import ops
from tests.kernels.checks import assert_close

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def absent() -> None:
    """For tests of what happens where the real packages are not installed."""
    there = [name for name in stand_ins.PACKAGES if importlib.util.find_spec(name)]
    if there:
        pytest.skip(f"{', '.join(there)} is installed here")


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_()


def check_gradients(ours: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """The result and the gradients of all inputs, in fp64."""
    torch.testing.assert_close(ours, expected)
    dy = torch.randn_like(ours)
    mine, theirs = (
        torch.autograd.grad(each, inputs, dy, retain_graph=True) for each in (ours, expected)
    )
    for gradient, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(gradient, wanted)


# Installing


def test_they_come_and_go(absent: None) -> None:
    assert stand_ins.install_stand_ins() == ("flash_attn", "grouped_gemm")
    try:
        assert stand_ins.install_stand_ins() == ()
        module = importlib.import_module("flash_attn.ops.triton.layer_norm")
        assert module.__name__ == "flash_attn.ops.triton.layer_norm"
        assert Path(module.__file__).is_relative_to(Path(stand_ins.__file__).parent)
        from flash_attn import flash_attn_interface
        from flash_attn.modules.mha import flash_attn_varlen_kvpacked_func

        # One copy, whatever the way to it.
        assert flash_attn_varlen_kvpacked_func is (
            flash_attn_interface.flash_attn_varlen_kvpacked_func
        )
        assert importlib.import_module("flash_attn").__nanotron_fast__ is True
        assert stand_ins.is_stand_in("flash_attn")
        # What others ask in order to know whether flash-attn is there.
        assert importlib.util.find_spec("flash_attn").name == "flash_attn"
        with pytest.raises(ModuleNotFoundError, match=r"flash_attn\.losses"):
            importlib.import_module("flash_attn.losses")
    finally:
        assert stand_ins.remove_stand_ins() == ("flash_attn", "grouped_gemm")
    assert not [name for name in sys.modules if name.partition(".")[0] in stand_ins.PACKAGES]
    assert stand_ins.remove_stand_ins() == ()
    assert importlib.util.find_spec("flash_attn") is None


def test_the_real_one_is_left_alone(
    absent: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn.py").write_text("is_real = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert stand_ins.install_stand_ins() == ("grouped_gemm",)
    try:
        assert importlib.import_module("flash_attn").is_real
        assert not stand_ins.is_stand_in("flash_attn")
        assert stand_ins.remove_stand_ins() == ("grouped_gemm",)
        assert "flash_attn" in sys.modules
    finally:
        sys.modules.pop("flash_attn", None)
        stand_ins.remove_stand_ins()


ATTENTION = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
NORM = (
    "x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, dropout_p=0.0, "
    "rowscale=None, prenorm=False, residual_in_fp32=False"
)


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (flash.flash_attn_func, f"q, k, v, {ATTENTION}"),
        (
            flash.flash_attn_varlen_func,
            "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
            f"{ATTENTION}, block_table=None",
        ),
        (
            flash.flash_attn_with_kvcache,
            "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
            "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, "
            "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
            "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False",
        ),
        (layer_norm.layer_norm_fn, f"{NORM}, is_rms_norm=False, return_dropout_mask=False"),
        (layer_norm.rms_norm_fn, f"{NORM}, return_dropout_mask=False"),
        (
            rotary.RotaryEmbedding,
            "dim, base=10000.0, interleaved=False, scale_base=None, pos_idx_in_fp32=True, "
            "device=None",
        ),
        (rotary.RotaryEmbedding.forward, "self, qkv, kv=None, seqlen_offset=0, max_seqlen=None"),
        (
            rotary.apply_rotary_emb,
            "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, "
            "max_seqlen=None",
        ),
        (bert_padding.unpad_input, "hidden_states, attention_mask"),
        (bert_padding.pad_input, "hidden_states, indices, batch, seqlen"),
        (ops.gmm, "a, b, batch_sizes, trans_b=False"),
        (ops.permute, "input_act, indices, num_out_tokens=None, max_token_num=0"),
        (ops.unpermute, "input_act, row_id_map, probs=None"),
    ],
)
def test_arguments_are_those_of_the_real_ones(function: Any, signature: str) -> None:
    parameters = inspect.signature(function).parameters.values()
    ours = [str(each.replace(annotation=inspect.Parameter.empty)) for each in parameters]
    assert ", ".join(ours) == signature


# Attention


def defined(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Of one sequence, (seq, heads, d): out, and lse (heads, seq)."""
    left, right = window_size
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    ahead = torch.arange(len(k))[None, :] - torch.arange(len(q))[:, None] - len(k) + len(q)
    hidden = (ahead > 0) if causal else torch.zeros_like(ahead, dtype=torch.bool)
    hidden |= (ahead < -left) if left >= 0 else False
    hidden |= (ahead > right) if right >= 0 else False
    # In place of exp(-inf) over its sum, which is 0 / 0 in a row that sees nothing.
    weights = scores.exp().masked_fill(hidden.to(q.device), 0.0)
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("hqk,khd->qhd", weights / total.clamp(min=1e-300), v)
    return out, total.squeeze(-1).log()


@pytest.mark.parametrize(
    ("seq_q", "seq_k", "options"),
    [
        (7, 7, {}),
        (7, 7, {"causal": True, "softmax_scale": 0.3, "softcap": 2.0}),
        (7, 7, {"causal": True, "window_size": (2, 2)}),
        (7, 7, {"window_size": (3, 0)}),
        (3, 8, {"causal": True}),
        # More queries than keys: the first ones see nothing, and get zero.
        (6, 4, {"causal": True}),
    ],
)
def test_attention(seq_q: int, seq_k: int, options: dict[str, Any]) -> None:
    q, k, v = randn(2, seq_q, 4, 8), randn(2, seq_k, 2, 8), randn(2, seq_k, 2, 8)
    rows = [defined(q[i], k[i], v[i], **options) for i in range(2)]
    expected = torch.stack([out for out, _ in rows])
    check_gradients(flash.flash_attn_func(q, k, v, **options), expected, [q, k, v])
    out, lse, mask = flash.flash_attn_func(q, k, v, **options, return_attn_probs=True)
    check_gradients(out, expected, [q, k, v])
    torch.testing.assert_close(lse, torch.stack([lse for _, lse in rows]))
    assert mask is None
    assert not lse.requires_grad
    kv = torch.stack((k, v), dim=2)
    torch.testing.assert_close(flash.flash_attn_kvpacked_func(q, kv, **options), expected)


@pytest.mark.parametrize("is_square", [True, False])
def test_attention_over_documents(is_square: bool) -> None:
    ends_q = torch.tensor([0, 3, 3, 10], dtype=torch.int32, device=DEVICE)
    # As many tokens and as long a longest document, but not the same ones.
    ends_k = ends_q.clone() if is_square else torch.tensor([0, 2, 3, 10], dtype=torch.int32)
    ends_k = ends_k.to(DEVICE)
    options = {"causal": True, "window_size": (4, 0)}
    q, k, v = randn(10, 4, 8), randn(10, 2, 8), randn(10, 2, 8)
    parts = [
        defined(q[a:b], k[c:d], v[c:d], **options)
        for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)
        if b > a
    ]
    expected = torch.cat([out for out, _ in parts])
    if DEVICE.type == "cuda" and not is_square:
        pytest.skip("the device asserts that the documents are the same")
    bounds = (ends_q, ends_k, 7, 7)
    out = flash.flash_attn_varlen_func(q, k, v, *bounds, **options)
    check_gradients(out, expected, [q, k, v])
    kv = torch.stack((k, v), dim=1)
    assert mha.flash_attn_varlen_kvpacked_func is flash.flash_attn_varlen_kvpacked_func
    out, lse, _ = flash.flash_attn_varlen_kvpacked_func(
        q, kv, *bounds, 0.0, **options, return_attn_probs=True
    )
    check_gradients(out, expected, [q, k, v])
    torch.testing.assert_close(lse, torch.cat([lse for _, lse in parts], dim=1))


def test_attention_over_documents_with_more_keys_than_queries() -> None:
    ends_q = torch.tensor([0, 2, 5], dtype=torch.int32, device=DEVICE)
    ends_k = torch.tensor([0, 6, 11], dtype=torch.int32, device=DEVICE)
    q, k, v = randn(5, 2, 8), randn(11, 2, 8), randn(11, 2, 8)
    out = flash.flash_attn_varlen_func(q, k, v, ends_q, ends_k, 3, 6, causal=True)
    parts = (defined(q[:2], k[:6], v[:6], True)[0], defined(q[2:], k[6:], v[6:], True)[0])
    check_gradients(out, torch.cat(parts), [q, k, v])


def test_packed_attention_in_bf16() -> None:
    qkv = randn(2, 9, 3, 2, 16, dtype=torch.bfloat16)
    out = flash.flash_attn_qkvpacked_func(qkv, causal=True)
    assert out.dtype == torch.bfloat16
    expected = [defined(*row.double().unbind(1), causal=True)[0] for row in qkv]
    assert_close(out.detach(), torch.stack(expected), factor=2)  # the weights round too
    ends = torch.tensor([0, 9, 18], dtype=torch.int32, device=DEVICE)
    varlen = flash.flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), ends, 9, causal=True)
    torch.testing.assert_close(varlen, out.flatten(0, 1))


@pytest.mark.parametrize("num_new", [0, 1, 3])
def test_attention_with_a_cache(num_new: int) -> None:
    lengths = torch.tensor([2, 5], dtype=torch.int32, device=DEVICE)
    q = randn(2, max(num_new, 1), 4, 8)
    caches = randn(2, 2, 8, 2, 8).detach()
    new = randn(2, 2, num_new, 2, 8).detach()
    k_cache, v_cache = caches.clone()
    given = tuple(new) if num_new else (None, None)
    out = flash.flash_attn_with_kvcache(
        q, k_cache, v_cache, *given, cache_seqlens=lengths, causal=True
    )
    for row, length in enumerate(lengths.tolist()):
        k, v = (torch.cat((caches[i, row, :length], new[i, row])) for i in (0, 1))
        torch.testing.assert_close(out[row], defined(q[row], k, v, causal=True)[0].detach())
        torch.testing.assert_close(k_cache[row, : length + num_new], k)
        torch.testing.assert_close(v_cache[row, : length + num_new], v)
        # The rest of the caches is as it was.
        torch.testing.assert_close(
            k_cache[row, length + num_new :], caches[0, row, length:][num_new:]
        )
    assert not out.requires_grad


def test_a_cache_that_is_too_small() -> None:
    q, cache = randn(1, 1, 2, 8), randn(1, 4, 2, 8).detach()
    with pytest.raises(ValueError, match="row 0 would end at 5 in a cache of 4"):
        flash.flash_attn_with_kvcache(q, cache, cache, q, q, cache_seqlens=4)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"dropout_p": 0.1}, "dropout_p"),
        ({"alibi_slopes": torch.ones(2)}, "alibi_slopes"),
        ({"deterministic": True}, "deterministic"),
        ({"window_size": (2, 3)}, "window_size"),
        ({"window_size": (2, -1)}, "window_size"),
        ({"dropout_p": 0.1, "deterministic": True}, "dropout_p, deterministic"),
    ],
)
def test_what_attention_does_not_do_is_named(options: dict[str, Any], name: str) -> None:
    q = randn(1, 4, 2, 8)
    with pytest.raises(NotImplementedError, match=f"flash_attn_func: .* does not support {name};"):
        flash.flash_attn_func(q, q, q, **options)


def test_what_else_is_named() -> None:
    q, x = randn(1, 4, 2, 8), randn(3, 8)
    table = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="does not support block_table"):
        flash.flash_attn_varlen_func(q[0], q[0], q[0], table, table, 4, 4, block_table=table)
    with pytest.raises(NotImplementedError, match="does not support rotary_cos, rotary_sin"):
        flash.flash_attn_with_kvcache(q, q, q, rotary_cos=x, rotary_sin=x)
    with pytest.raises(NotImplementedError, match="has no context parallelism"):
        flash._flash_attn_varlen_forward(q, q, q)
    with pytest.raises(NotImplementedError, match="does not support x1, dropout_p, rowscale"):
        layer_norm.layer_norm_fn(x, x[0], None, x1=x, dropout_p=0.1, rowscale=x[:, 0])
    with pytest.raises(NotImplementedError, match="does not support return_dropout_mask"):
        layer_norm.rms_norm_fn(x, x[0], None, return_dropout_mask=True)
    with pytest.raises(NotImplementedError, match="does not support scale_base"):
        rotary.RotaryEmbedding(8, scale_base=512)
    with pytest.raises(NotImplementedError, match="does not support num_out_tokens"):
        ops.permute(x, torch.zeros(3, 1), num_out_tokens=2)
