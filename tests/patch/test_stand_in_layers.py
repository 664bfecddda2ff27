"""The stand-ins for flash-attn's norms, rotary and padding, and for grouped_gemm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanotron_fast.patch.stand_ins.flash_attn import bert_padding
from nanotron_fast.patch.stand_ins.flash_attn.layers import rotary
from nanotron_fast.patch.stand_ins.flash_attn.ops.triton import layer_norm
from nanotron_fast.patch.stand_ins.grouped_gemm import ops
from tests.kernels.checks import assert_close
from tests.patch.test_stand_ins import DEVICE, check_gradients, randn

EPS = 1e-3


def normed(h: Tensor, weight: Tensor, bias: Tensor | None, is_rms_norm: bool) -> Tensor:
    if not is_rms_norm:
        h = h - h.mean(-1, keepdim=True)
    y = h / torch.sqrt(h.square().mean(-1, keepdim=True) + EPS) * weight
    return y if bias is None else y + bias


# Norms


@pytest.mark.parametrize("is_rms_norm", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
def test_norm(is_rms_norm: bool, has_bias: bool, has_residual: bool) -> None:
    x, weight = randn(3, 5, 12), randn(12)
    bias = randn(12) if has_bias else None
    residual = randn(3, 5, 12) if has_residual else None
    inputs = [each for each in (x, weight, bias, residual) if each is not None]
    total = x if residual is None else x + residual
    expected = normed(total, weight, bias, is_rms_norm)
    options = {"residual": residual, "eps": EPS, "is_rms_norm": is_rms_norm}
    check_gradients(layer_norm.layer_norm_fn(x, weight, bias, **options), expected, inputs)
    y, h = layer_norm.layer_norm_fn(x, weight, bias, **options, prenorm=True)
    # Both results together: the sum's gradient passes through the norm and beside it.
    check_gradients(torch.cat((y, h)), torch.cat((expected, total)), inputs)


@pytest.mark.parametrize("is_rms_norm", [True, False])
@pytest.mark.parametrize(
    ("residual_dtype", "in_fp32", "sum_dtype"),
    [
        (None, False, torch.bfloat16),
        (None, True, torch.float32),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float32, False, torch.float32),
    ],
)
def test_dtypes_of_the_sum(
    is_rms_norm: bool, residual_dtype: torch.dtype | None, in_fp32: bool, sum_dtype: torch.dtype
) -> None:
    x, weight = randn(4, 16, dtype=torch.bfloat16), randn(16, dtype=torch.bfloat16)
    residual = None if residual_dtype is None else randn(4, 16, dtype=residual_dtype)
    y, h = layer_norm.layer_norm_fn(
        x, weight, None, residual, eps=EPS, prenorm=True, residual_in_fp32=in_fp32,
        is_rms_norm=is_rms_norm,
    )  # fmt: skip
    assert (y.dtype, h.dtype) == (torch.bfloat16, sum_dtype)
    total = x.double() + (0 if residual is None else residual.double())
    assert_close(h.detach(), total)
    # The sum was rounded before it was normed.
    expected = normed(h.double(), weight.double(), None, is_rms_norm)
    assert_close(y.detach(), expected.detach())


def test_rms_norm_by_its_own_name() -> None:
    x, weight, bias = randn(3, 8), randn(8), randn(8)
    y = layer_norm.rms_norm_fn(x, weight, bias, eps=EPS)
    check_gradients(y, normed(x, weight, bias, True), [x, weight, bias])


# Rotary


def turned(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """x (..., heads, d) by angles (..., rotary_dim/2): a product of complex numbers."""
    half = angles.shape[-1]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = turning.unflatten(-1, (half, 2) if interleaved else (2, half))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    factors = torch.polar(torch.ones_like(angles), angles)[..., None, :]
    result = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * factors)
    result = result if interleaved else result.transpose(-1, -2)
    return torch.cat((result.flatten(-2), rest), -1)


def angles_of(positions: Tensor, dim: int, base: float) -> Tensor:
    exponents = torch.arange(0, dim, 2, device=DEVICE, dtype=torch.float64) / dim
    return positions[..., None].to(DEVICE) / base**exponents


@pytest.fixture(params=["triton", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Our kernel, interpreted where there is no GPU, and plain torch."""
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", request.param)
    return str(request.param)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_rotary(path: str, interleaved: bool, num_kv_heads: int) -> None:
    q = randn(2, 5, 4, 16, dtype=torch.float32)
    # Views into one tensor, as Nanotron's Qwen2 has them.
    packed = randn(2, 5, 2 * num_kv_heads * 16 + 3, dtype=torch.float32)
    kv = packed[..., 3:].unflatten(-1, (2, num_kv_heads, 16))
    module = rotary.RotaryEmbedding(16, base=500.0, interleaved=interleaved).to(DEVICE)
    before = q.detach().clone(), packed.detach().clone()
    q_out, kv_out = module(q, kv, seqlen_offset=3, max_seqlen=20)
    assert module._cos_cached.shape == (20, 8)
    angles = angles_of(torch.arange(3, 8), 16, 500.0)
    expected = turned(q.double(), angles, interleaved)
    keys = turned(kv[:, :, 0].double(), angles, interleaved)
    expected_kv = torch.stack((keys, kv[:, :, 1].double()), 2)
    for ours, theirs in ((q_out, expected), (kv_out, expected_kv)):
        # Angles of up to 8 radians in fp32.
        assert_close(ours.detach(), theirs.detach(), factor=4)
    gradients = torch.randn_like(q_out), torch.randn_like(kv_out)
    ours = torch.autograd.grad((q_out, kv_out), (q, packed), gradients)
    theirs = torch.autograd.grad(
        (expected, expected_kv), (q, packed), [each.double() for each in gradients]
    )
    for mine, wanted in zip(ours, theirs, strict=True):
        assert_close(mine, wanted, factor=4)
    assert torch.equal(q, before[0])
    assert torch.equal(packed, before[1])


def test_one_gradient_alone(path: str) -> None:
    q = randn(1, 3, 2, 8, dtype=torch.float32)
    kv = randn(1, 3, 2, 2, 8, dtype=torch.float32)
    module = rotary.RotaryEmbedding(8, interleaved=True).to(DEVICE)
    _, kv_out = module(q, kv)
    dq, dkv = torch.autograd.grad(kv_out[:, :, 0].sum(), (q, kv), allow_unused=True)
    assert dq is None or not dq.any()
    assert dkv[:, :, 0].abs().max() > 0
    assert not dkv[:, :, 1].any()


def test_rotary_tables_in_bf16(path: str) -> None:
    """They are rounded to the activations' dtype, and their frequencies are not."""
    module = rotary.RotaryEmbedding(16, base=100.0).to(DEVICE, torch.bfloat16)
    assert module.inv_freq.dtype == torch.bfloat16
    q, kv = randn(1, 40, 2, 16, dtype=torch.bfloat16), randn(1, 40, 2, 2, 16, dtype=torch.bfloat16)
    q_out, _ = module(q, kv)
    angles = angles_of(torch.arange(40), 16, 100.0)
    assert module._cos_cached.dtype == torch.bfloat16
    assert_close(module._cos_cached, angles.cos())
    assert_close(q_out.detach(), turned(q.double(), angles, False).detach(), factor=2)
    in_bf16 = rotary.RotaryEmbedding(16, base=100.0, pos_idx_in_fp32=False).to(
        DEVICE, torch.bfloat16
    )
    in_bf16(q, kv)
    assert not torch.equal(in_bf16._cos_cached, module._cos_cached)


def test_rotary_tables_grow() -> None:
    module = rotary.RotaryEmbedding(8).to(DEVICE)
    module(randn(1, 6, 3, 2, 8, dtype=torch.float32))
    table = module._cos_cached
    module(randn(1, 4, 3, 2, 8, dtype=torch.float32))
    assert module._cos_cached is table
    module(randn(1, 9, 3, 2, 8, dtype=torch.float32))
    assert len(module._cos_cached) == 9
    module(randn(1, 2, 3, 2, 8))
    assert module._cos_cached.dtype == torch.float64
    with torch.inference_mode():
        module.eval()(torch.randn(1, 12, 3, 2, 8, device=DEVICE))
    module.train()(randn(1, 4, 3, 2, 8, dtype=torch.float32))
    assert not module._cos_cached.is_inference()
    assert not module.state_dict()
    with pytest.raises(ValueError, match="a seqlen_offset tensor needs max_seqlen"):
        rotary.RotaryEmbedding(8)(randn(1, 2, 3, 2, 8), seqlen_offset=torch.tensor([1]))


def test_rotary_of_packed_qkv_with_an_offset_for_each_sequence() -> None:
    offsets = torch.tensor([0, 7], device=DEVICE)
    qkv = randn(2, 4, 3, 2, 8)
    module = rotary.RotaryEmbedding(8, interleaved=True).to(DEVICE)
    out = module(qkv, seqlen_offset=offsets, max_seqlen=11)
    angles = angles_of(torch.stack((torch.arange(4), torch.arange(7, 11))), 8, 10000.0)
    wanted = [turned(qkv[:, :, i], angles, True) for i in (0, 1)]
    expected = torch.stack((*wanted, qkv[:, :, 2]), 2)
    # The tables are made from fp32 frequencies.
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interleaved", [True, False])
def test_one_tensor_by_given_tables(path: str, interleaved: bool) -> None:
    x = randn(2, 5, 1, 12, dtype=torch.float32)
    angles = angles_of(torch.arange(9), 8, 100.0)
    tables = angles.cos().float(), angles.sin().float()
    # Eight of twelve columns turn.
    out = rotary.apply_rotary_emb(x, *tables, interleaved, seqlen_offsets=2, inplace=True)
    expected = turned(x.double(), angles[2:7], interleaved)
    assert_close(out.detach(), expected.detach(), factor=2)
    dy = torch.randn_like(out)
    (dx,) = torch.autograd.grad(out, x, dy)
    assert_close(dx, torch.autograd.grad(expected, x, dy.double())[0], factor=2)
    with pytest.raises(ValueError, match="10 positions, tables for 9"):
        rotary.apply_rotary_emb(x, *tables, seqlen_offsets=5)


def test_one_tensor_of_documents() -> None:
    x = randn(7, 2, 8)
    angles = angles_of(torch.arange(9), 8, 100.0)
    ends = torch.tensor([0, 4, 4, 7], dtype=torch.int32, device=DEVICE)
    for offsets in (0, torch.tensor([1, 0, 2], device=DEVICE)):
        starts = [0, 0] if isinstance(offsets, int) else [1, 2]
        positions = torch.cat([torch.arange(4) + starts[0], torch.arange(3) + starts[1]])
        out = rotary.apply_rotary_emb(
            x, angles.cos(), angles.sin(), seqlen_offsets=offsets, cu_seqlens=ends, max_seqlen=4
        )
        check_gradients(out, turned(x, angles[positions], False), [x])


# Padding


def test_padding_goes_and_comes() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]], device=DEVICE)
    x = randn(2, 4, 3)
    tokens, indices, cu_seqlens, longest = bert_padding.unpad_input(x, mask.bool())
    check_gradients(tokens, torch.stack((x[0, 1], x[0, 2], x[1, 0])), [x])
    assert indices.tolist() == [1, 2, 4]
    assert (cu_seqlens.tolist(), cu_seqlens.dtype, longest) == ([0, 2, 3], torch.int32, 2)
    values = randn(3, 5)
    padded = bert_padding.pad_input(values, indices, 2, 4)
    zero = torch.zeros_like(values[0])
    rows = [[zero, values[0], values[1], zero], [values[2], zero, zero, zero]]
    check_gradients(padded, torch.stack([torch.stack(row) for row in rows]), [values])


# Experts


@pytest.mark.parametrize("trans_b", [True, False])
def test_grouped_products(trans_b: bool) -> None:
    a, b = randn(6, 4), randn(3, 5, 4) if trans_b else randn(3, 4, 5)
    out = ops.gmm(a, b, torch.tensor([2, 0, 4]), trans_b=trans_b)
    weights = b.transpose(1, 2) if trans_b else b
    check_gradients(out, torch.cat((a[:2] @ weights[0], a[2:] @ weights[2])), [a, b])
    with pytest.raises(ValueError, match=r"gmm: batch_sizes \[2, 2\] for a \(6, 4\)"):
        ops.gmm(a, b, torch.tensor([2, 2]))


def test_tokens_go_to_experts_and_back() -> None:
    x = randn(4, 6)
    indices = torch.tensor([[1, 0], [0, 2], [1, 2], [2, 0]], dtype=torch.int32, device=DEVICE)
    probs = torch.rand(4, 2, device=DEVICE, dtype=torch.float64, requires_grad=True)
    permuted, row_id_map = ops.permute(x, indices)
    check_gradients(permuted, x[[0, 1, 3, 0, 2, 1, 2, 3]], [x])
    # Each expert multiplies by another number.
    factors = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64, device=DEVICE)
    experts = factors.repeat_interleave(indices.flatten().long().bincount())
    out = ops.unpermute(permuted * experts[:, None], row_id_map, probs)
    expected = x * (probs * factors[indices.long()]).sum(1, keepdim=True)
    check_gradients(out, expected, [x, probs])


def test_one_expert_for_each_token() -> None:
    x = randn(3, 4)
    permuted, row_id_map = ops.permute(x, torch.tensor([2, 0, 1], device=DEVICE))
    check_gradients(permuted, x[[1, 2, 0]], [x])
    check_gradients(ops.unpermute(permuted, row_id_map), x, [x])
