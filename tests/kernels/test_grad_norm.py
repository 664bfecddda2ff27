"""The total norm of lists and clipping by it, against fp64 and against torch."""

from __future__ import annotations

import math

import pytest
import torch

from nanotron_fast.kernels.optimizer import (
    clip_grad_norm_,
    get_total_norm,
)
from tests.kernels.checks import assert_close, wide
from tests.kernels.lists import SHAPES, assert_guards, make
from tests.parallel.ranks import run_ranks

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, math.inf])
@pytest.mark.parametrize("offset", [0, 1])
def test_clip_against_fp64(path, device, norm_type, offset) -> None:
    torch.manual_seed(0)
    grads, buffers = make([FP32, BF16, FP16], device, [*SHAPES, (20000,)], offset)
    copies = [wide(grad) for grad in grads]
    flat = torch.cat([copy.flatten() for copy in copies])
    norm64 = torch.linalg.vector_norm(flat, norm_type)
    norm = clip_grad_norm_(grads, 0.25, norm_type)
    assert norm.dtype == FP32
    assert norm.shape == ()
    # The sum is rounded as often as it has levels.
    assert_close(norm, norm64, factor=2)
    for grad, copy in zip(grads, copies, strict=True):
        # The norm's error is in every element.
        assert_close(grad, copy * (0.25 / (norm64 + 1e-6)), factor=2)
    assert_guards(buffers)


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_the_norm_of_many_elements_is_exact(torch_path, norm_type) -> None:
    """A sum of 4 million squares in one fp32 number would be off by 1e-4."""
    torch.manual_seed(0)
    grad = torch.rand(4_000_001, device=torch_path)
    assert_close(get_total_norm([grad], norm_type), wide(grad).norm(norm_type))


@pytest.mark.parametrize("norm_type", [1, 2, 3.0, "inf"])
def test_clip_is_that_of_torch(path, device, norm_type) -> None:
    torch.manual_seed(0)
    ours, _ = make([FP32], device, [(5, 7), (300,)])
    theirs = [torch.zeros_like(grad).requires_grad_() for grad in ours]
    for grad, parameter in zip(ours, theirs, strict=True):
        parameter.grad = grad.clone()
    norm = clip_grad_norm_(ours, 1.5, float(norm_type))
    expected = torch.nn.utils.clip_grad_norm_(theirs, 1.5, norm_type)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(ours, [parameter.grad for parameter in theirs])


def test_norms_are_the_same_in_every_run(triton_path) -> None:
    grads, _ = make([FP32, BF16], triton_path, [(40000,), (333,)])
    assert len({get_total_norm(grads).item() for _ in range(4)}) == 1


def test_within_the_bound_nothing_is_written(path, device) -> None:
    grads, _ = make([FP32, BF16], device)
    kept = [grad.clone() for grad in grads]
    clip_grad_norm_(grads, 1e6)
    clip_grad_norm_(grads, math.inf)
    assert all(torch.equal(*pair) for pair in zip(grads, kept, strict=True))


def test_a_norm_just_above_the_bound(path, device) -> None:
    (grad,), _ = make([FP32], device, [(3000,)])
    reference, max_norm = wide(grad), get_total_norm([grad]).item() * (1 - 1e-5)
    clip_grad_norm_([grad], max_norm)
    assert_close(grad, reference * (max_norm / (reference.norm() + 1e-6)))


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_spreads_as_with_torch(path, device, norm_type, bad) -> None:
    ours = [torch.ones(2500, device=device), torch.ones(3, device=device)]
    ours[0][2100] = bad
    theirs = [torch.zeros_like(grad).requires_grad_() for grad in ours]
    for grad, parameter in zip(ours, theirs, strict=True):
        parameter.grad = grad.clone()
    with pytest.raises(RuntimeError, match="cannot be clipped"):
        clip_grad_norm_(ours, 1.0, norm_type, error_if_nonfinite=True)
    norm = clip_grad_norm_(ours, 1.0, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0, norm_type)
    torch.testing.assert_close(norm, expected, equal_nan=True)
    torch.testing.assert_close(ours, [p.grad for p in theirs], equal_nan=True)


def test_the_norm_over_two_ranks() -> None:
    run_ranks("tests.kernels.norm_ranks", 2)
