"""Triton's interpreter as the tests run it."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from nanotron_fast.kernels.attention import attention, attention_reference
from nanotron_fast.kernels.matmul import (
    matmul_glu,
    matmul_glu_reference,
    matmul_rope,
    matmul_rope_reference,
)
from nanotron_fast.kernels.rms_norm import rms_norm
from nanotron_fast.kernels.runtime.backend import is_interpreting
from tests.kernels.checks import assert_close


@pytest.mark.skipif(not is_interpreting(), reason="kernels are compiled here")
def test_a_launch_patches_the_language_once_and_puts_it_back(
    triton_path: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has functions of its own, and calls `tl.sum` for each block of rows."""
    from triton.runtime import interpreter

    patched: list[object] = []
    patch = interpreter._patch_builtin

    def counted(module: object, *arguments: object) -> None:
        patched.append(module)
        patch(module, *arguments)

    monkeypatch.setattr(interpreter, "_patch_builtin", counted)
    before = {owner: dict(vars(owner)) for owner in (tl, tl.tensor)}
    with torch.no_grad():
        rms_norm(torch.randn(40, 96, device=triton_path), torch.ones(96, device=triton_path))
    # Once for the kernel; and once where a function of Triton's own sees `core`, and `tl` or not.
    assert 1 <= patched.count(tl) <= 2
    assert patched.count(tl.core) <= 1
    for owner, members in before.items():
        assert all(vars(owner)[name] is member for name, member in members.items())


@pytest.mark.skipif(not is_interpreting(), reason="kernels are compiled here")
def test_products_of_bf16_are_not_interpreted(triton_path: torch.device) -> None:
    """The interpreter would multiply the bits of bf16 as whole numbers, and say nothing."""
    q, x, weight = (torch.randn(shape).bfloat16() for shape in ((1, 4, 1, 16), (3, 16), (48, 16)))
    angles = torch.rand(3, 8)
    heads = (None, angles.cos(), angles.sin(), 1, 1, 16)
    assert_close(attention(q, q, q), attention_reference(q, q, q))
    assert_close(matmul_glu(x, weight), matmul_glu_reference(x, weight))
    assert_close(matmul_rope(x, weight, *heads), matmul_rope_reference(x, weight, *heads))
