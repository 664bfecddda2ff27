"""rope_normed: a norm of each head and rotary embedding in one pass, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nanotron_fast.kernels.rope import normed_operators as module
from nanotron_fast.kernels.rope import rope_tables
from nanotron_fast.kernels.rope.normed import rope_normed, rope_normed_reference
from tests.kernels.checks import assert_close, wide

POSITIONS = 24


def make(
    dtype: torch.dtype, device: torch.device, tokens: int = 13, heads: int = 5, dim: int = 12
) -> list[Tensor]:
    """q (tokens, heads, dim) whose rows lie apart, k with two heads, and their weights."""
    q = torch.randn(tokens, heads, dim + 4, device=device).to(dtype)[..., :dim]
    k = torch.randn(tokens, 2, dim, device=device).to(dtype)
    weights = [torch.randn(dim, device=device).to(dtype) for _ in range(2)]
    return [each.requires_grad_() for each in (q, k, *weights)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("share", "interleaved", "has_positions", "zero_centered"),
    [(1.0, False, False, False), (1.0, True, True, False), (2 / 3, False, True, True)],
)
def test_forward_and_backward(
    dtype: torch.dtype,
    share: float,
    interleaved: bool,
    has_positions: bool,
    zero_centered: bool,
    path: str,
    device: torch.device,
) -> None:
    torch.manual_seed(0)
    given = make(dtype, device)
    cos, sin = rope_tables(12, POSITIONS, partial_rotary_factor=share, device=device)
    positions = torch.randint(POSITIONS, (13,), device=device) if has_positions else None
    options: dict[str, Any] = {
        "eps": 1e-6,
        "position_ids": positions,
        "interleaved": interleaved,
        "zero_centered": zero_centered,
    }
    leaves = [wide(each, True) for each in given]
    expected = rope_normed_reference(*leaves, cos, sin, **options)
    ours = rope_normed(*given, cos, sin, **options)
    # The gradient of a transposed tensor, as attention gives it.
    dq = torch.randn(5, 13, 12, device=device).to(dtype).transpose(0, 1)
    dk = torch.randn_like(ours[1])
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.is_contiguous()
        assert_close(mine, theirs)
    grads = torch.autograd.grad(ours, given, (dq, dk))
    wanted = torch.autograd.grad(expected, leaves, (wide(dq), wide(dk)))
    for mine, theirs in zip(grads, wanted, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize(("heads", "dim", "share"), [(9, 32, 0.5), (1, 2, 1.0), (17, 20, 0.8)])
def test_odd_sizes(heads: int, dim: int, share: float, triton_path: torch.device) -> None:
    given = make(torch.float32, triton_path, tokens=70, heads=heads, dim=dim)
    cos, sin = rope_tables(dim, 70, partial_rotary_factor=share, device=triton_path)
    for interleaved in (False, True):
        leaves = [wide(each, True) for each in given]
        expected = rope_normed_reference(*leaves, cos, sin, 1e-6, None, interleaved)
        ours = rope_normed(*given, cos, sin, interleaved=interleaved)
        grads = torch.autograd.grad(ours, given, [torch.ones_like(x) for x in ours])
        wanted = torch.autograd.grad(expected, leaves, [torch.ones_like(x) for x in expected])
        for mine, theirs in zip((*ours, *grads), (*expected, *wanted), strict=True):
            assert_close(mine, theirs)


@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_alone(which: int, path: str, device: torch.device) -> None:
    given = make(torch.float32, device)
    cos, sin = rope_tables(12, POSITIONS, device=device)
    alone = rope_normed(*given, cos, sin)[which]
    grads = torch.autograd.grad(alone.sum(), given, materialize_grads=True)
    for at in (which, which + 2):
        assert grads[at].abs().max() > 0
    for at in (1 - which, 3 - which):
        assert not grads[at].any()


def test_a_position_outside_the_tables_spoils_its_token_alone(triton_path: torch.device) -> None:
    given = make(torch.float32, triton_path)
    cos, sin = rope_tables(12, POSITIONS, device=triton_path)
    positions = torch.arange(13, device=triton_path)
    positions[3] = POSITIONS
    # The function itself raises on the CPU.
    q, k = module.forward(
        *(each.detach() for each in given), cos, sin, positions, 1e-6, False, False
    )
    assert q[3].isnan().all()
    assert k[3].isnan().all()
    assert not q[[0, 12]].isnan().any()


def test_no_tokens(path: str, device: torch.device) -> None:
    cos, sin = rope_tables(12, POSITIONS, device=device)
    given = make(torch.float32, device, tokens=0)
    outs = rope_normed(*given, cos, sin)
    assert [out.shape for out in outs] == [(0, 5, 12), (0, 2, 12)]
    grads = torch.autograd.grad(sum(out.sum() for out in outs), given)
    assert not grads[2].any()


def test_operators_are_what_torch_expects(triton_path: torch.device) -> None:
    q, k, *weights = (each.detach() for each in make(torch.float32, triton_path))
    cos, sin = rope_tables(12, POSITIONS, device=triton_path)
    rest = (*weights, cos, sin, None, 1e-6, False, False)
    torch.library.opcheck(module.forward.overload, (q, k, *rest))
    torch.library.opcheck(module.backward.overload, (q, k, q, k, *rest))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": torch.zeros(12, 2, 12)}, r"beside k \(12, 2, 12\)"),
        ({"k": torch.zeros(13, 2, 12).half()}, r"torch\.float16"),
        ({"k_weight": torch.zeros(24)}, r"k_weight \(24,\) for heads of 12"),
        ({"cos": torch.zeros(24, 7)}, "for head_dim 12"),
        ({"cos": torch.zeros(12, 6), "sin": torch.zeros(12, 6)}, "13 tokens, tables for 12"),
        ({"position_ids": torch.arange(12)}, r"position_ids \(12,\) torch\.int64 for 13 tokens"),
        ({"position_ids": torch.zeros(13)}, r"position_ids \(13,\) torch\.float32"),
        ({"position_ids": torch.arange(13) - 1}, "position -1, tables for"),
    ],
)
def test_refuses(change: dict[str, Tensor], words: str) -> None:
    names = ("q", "k", "q_weight", "k_weight", "cos", "sin")
    given = dict(
        zip(
            names,
            (*make(torch.float32, torch.device("cpu")), *rope_tables(12, POSITIONS)),
            strict=True,
        )
    )
    with pytest.raises(ValueError, match=f"^rope_normed: .*{words}"):
        rope_normed(**{**given, **change})
