"""Runs of rows, each by a matrix of its own, beside a loop over the runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nanotron_fast.parallel import grouped
from nanotron_fast.parallel.grouped import Runs, grouped_linear

COUNTS = {
    "some without rows": [3, 0, 5, 2, 0],
    "all in one": [0, 0, 0, 11, 0],
    "none at all": [0, 0, 0, 0, 0],
}
BF16 = torch.bfloat16
WIDTHS = (8, 16)


def tensors(counts: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), WIDTHS[0], generator=generator)
    weight = torch.randn(len(counts), *WIDTHS, generator=generator)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def expected(x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    parts = [rows @ each for rows, each in zip(x.split(counts), weight, strict=True)]
    return torch.cat(parts)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that nobody has written holds NaN; on a CPU, where torch can do it."""
    torch.use_deterministic_algorithms(not torch.cuda.is_available(), warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("in_one_launch", [False, True])
@pytest.mark.parametrize("name", COUNTS)
def test_a_loop_over_the_runs(
    name: str, in_one_launch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = COUNTS[name]
    # Of torch's grouped product, what it does on a CPU.
    monkeypatch.setattr(grouped, "_is_one_launch", lambda x, weight: in_one_launch and len(x))
    x, weight = tensors(counts, torch.float32)
    out = grouped_linear(x, weight, Runs(torch.tensor(counts)))
    wanted = expected(x, weight, counts)
    torch.testing.assert_close(out, wanted)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(out, (x, weight), upstream)
    theirs = torch.autograd.grad(wanted, (x, weight), upstream)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_main_gradients_are_added_to_in_fp32(dtype: torch.dtype) -> None:
    counts = COUNTS["some without rows"]
    x, weight = tensors(counts, dtype)
    weight.main_grad = torch.full(weight.shape, 3.0)
    for _ in range(2):
        grouped_linear(x, weight, Runs(torch.tensor(counts))).sum().backward()
    assert weight.grad is None
    exact = x.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    expected(*exact, counts).sum().backward()
    assert exact[1].grad is not None
    # No gradient is rounded to the parameter's dtype in between.
    torch.testing.assert_close(weight.main_grad, 3.0 + 2 * exact[1].grad, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", COUNTS)
def test_one_launch_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = COUNTS[name]
    results = []
    for in_one_launch in (True, False):
        if not in_one_launch:
            monkeypatch.setattr(grouped, "_is_one_launch", lambda x, weight: False)
        x, weight = (each.detach().cuda().requires_grad_() for each in tensors(counts, BF16))
        runs = Runs(torch.tensor(counts, device="cuda"))
        out = grouped_linear(x, weight, runs)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, weight))))
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


def test_a_frozen_matrix_or_input_gets_no_gradient() -> None:
    counts = COUNTS["some without rows"]
    x, weight = tensors(counts, torch.float32)
    runs = Runs(torch.tensor(counts))
    (dx,) = torch.autograd.grad(grouped_linear(x, weight.detach(), runs).sum(), x)
    (dw,) = torch.autograd.grad(grouped_linear(x.detach(), weight, runs).sum(), weight)
    wanted = torch.autograd.grad(expected(x, weight, counts).sum(), (x, weight))
    torch.testing.assert_close((dx, dw), wanted)


def test_shapes_that_do_not_fit() -> None:
    x, weight = tensors([2, 3], torch.float32)
    with pytest.raises(ValueError, match=r"x \(5, 8\), weight \(2, 8, 16\) and 3 groups"):
        grouped_linear(x, weight, Runs(torch.tensor([2, 3, 0])))
    with pytest.raises(ValueError, match=r"x \(5, 4\), weight \(2, 8, 16\) and 2 groups"):
        grouped_linear(x[:, :4], weight, Runs(torch.tensor([2, 3])))
