"""The kernels' CPU paths under pytest-benchmark: pytest benchmarks/test_kernels.py."""

from __future__ import annotations

import pytest
import torch

kernel_cases = pytest.importorskip("kernel_cases")

PAIRS = [
    pytest.param(case, name, id=f"{case.op}-{name}")
    for case in kernel_cases.cpu_cases()
    for name in case.variants
    if name != "torch.compile"
]


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_forward_and_backward(benchmark, case, name) -> None:
    """One step of each variant, checked against the reference before it is timed."""
    reference = next(iter(case.variants.values()))

    def step(function) -> list[torch.Tensor]:
        torch.manual_seed(0)
        tensors = case.tensors()
        outputs = function(*tensors)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        return [*outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), tensors)]

    for ours, expected in zip(step(case.variants[name]), step(reference), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    benchmark.group = case.op
    benchmark(step, case.variants[name])
