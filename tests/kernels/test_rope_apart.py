"""rope_apart: q and kv in tensors of their own, against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nanotron_fast.kernels.rope import rope_tables
from nanotron_fast.kernels.rope.apart import rope_apart, rope_apart_reference
from tests.kernels.checks import assert_close, wide

POSITIONS = 24


def make(
    dtype: torch.dtype, device: torch.device, num_beside: int, tokens: int = 13, dim: int = 12
) -> tuple[Tensor, Tensor]:
    """q (tokens, 4, dim), a view whose rows lie apart, and kv (tokens, n, 2, dim)."""
    q = torch.randn(tokens, 4, dim + 4, device=device).to(dtype)[..., :dim]
    kv = torch.randn(tokens, num_beside, 2, dim, device=device).to(dtype)
    return q.requires_grad_(), kv.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_beside", [1, 2])
@pytest.mark.parametrize(
    ("share", "interleaved", "has_positions"),
    [(1.0, False, False), (1.0, True, True), (2 / 3, False, True)],
)
def test_forward_and_backward(
    dtype: torch.dtype,
    num_beside: int,
    share: float,
    interleaved: bool,
    has_positions: bool,
    path: str,
    device: torch.device,
) -> None:
    torch.manual_seed(0)
    q, kv = make(dtype, device, num_beside)
    cos, sin = rope_tables(12, POSITIONS, partial_rotary_factor=share, device=device)
    positions = torch.randint(POSITIONS, (len(q),), device=device) if has_positions else None
    wide_q, wide_kv = wide(q, True), wide(kv, True)
    expected = rope_apart_reference(wide_q, wide_kv, cos, sin, positions, interleaved)
    ours = rope_apart(q, kv, cos, sin, positions, interleaved)
    assert torch.equal(ours[1][:, 1:], kv[:, 1:])
    # The gradient of a transposed tensor, as attention gives it.
    dq = torch.randn(4, 13, 12, device=device).to(dtype).transpose(0, 1)
    dkv = torch.randn_like(ours[1])
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.is_contiguous()
        assert_close(mine, theirs)
    grads = torch.autograd.grad(ours, (q, kv), (dq, dkv))
    wanted = torch.autograd.grad(expected, (wide_q, wide_kv), (wide(dq), wide(dkv)))
    for mine, theirs in zip(grads, wanted, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_alone(which: int, path: str, device: torch.device) -> None:
    q, kv = make(torch.float32, device, 1)
    cos, sin = rope_tables(12, POSITIONS, device=device)
    alone = rope_apart(q, kv, cos, sin)[which]
    grads = torch.autograd.grad(alone.sum(), (q, kv), materialize_grads=True)
    assert grads[which].abs().max() > 0
    assert not grads[1 - which].any()


def test_no_tokens(path: str, device: torch.device) -> None:
    cos, sin = rope_tables(12, POSITIONS, device=device)
    outs = rope_apart(*make(torch.float32, device, 1, tokens=0), cos, sin)
    assert [out.shape for out in outs] == [(0, 4, 12), (0, 1, 2, 12)]


def test_compiles_whole(triton_path: torch.device) -> None:
    q, kv = make(torch.float32, triton_path, 1)
    cos, sin = rope_tables(12, POSITIONS, device=triton_path)
    torch._dynamo.reset()
    compiled = torch.compile(rope_apart, fullgraph=True, backend="aot_eager")
    expected, found = (
        torch.autograd.grad(sum(x.square().sum() for x in f(q, kv, cos, sin)), (q, kv))
        for f in (rope_apart, compiled)
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv": torch.zeros(13, 3, 2, 12)}, r"beside kv \(13, 3, 2, 12\)"),
        ({"kv": torch.zeros(12, 1, 2, 12)}, r"beside kv \(12, 1, 2, 12\)"),
        ({"kv": torch.zeros(13, 1, 2, 12).half()}, r"torch\.float16"),
        ({"cos": torch.zeros(24, 7)}, "for head_dim 12"),
        ({"cos": torch.zeros(12, 6), "sin": torch.zeros(12, 6)}, "13 tokens, tables for 12"),
        ({"position_ids": torch.arange(12)}, r"position_ids \(12,\) torch\.int64 for 13 tokens"),
        ({"position_ids": torch.zeros(13, 1).long()}, r"position_ids \(13, 1\) torch\.int64"),
        ({"position_ids": torch.zeros(13)}, r"position_ids \(13,\) torch\.float32"),
        ({"position_ids": torch.arange(13) - 1}, "position -1, tables for"),
        ({"q": torch.zeros(13, 4, 12).long(), "kv": torch.zeros(13, 1, 2, 12).long()}, "int64"),
    ],
)
def test_refuses(change: dict[str, Tensor], words: str) -> None:
    q, kv = make(torch.float32, torch.device("cpu"), 1)
    cos, sin = rope_tables(12, POSITIONS)
    with pytest.raises(ValueError, match=f"^rope_apart: .*{words}"):
        rope_apart(**{"q": q, "kv": kv, "cos": cos, "sin": sin, **change})
