"""The kernels' CPU paths under pytest-benchmark: pytest benchmarks/test_kernels.py."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.cases.case import Setting
from benchmarks.gpu.cases.registry import all_cases
from nanotron_fast.kernels.pack import pack_qkv, shard

PAIRS = [
    pytest.param(case, name, id=f"{case.operation} {case.shape}-{name}")
    for case in all_cases(Setting.on_cpu())
    for name in case.variants
    if name != "torch.compile" and name not in case.unlike
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
        ways = [out for out in outputs if out.requires_grad]
        leaves = [t for t in tensors if t.requires_grad]
        gradients = torch.autograd.grad(sum(o.sum() for o in ways), leaves) if ways else ()
        return [*outputs, *gradients]

    for ours, expected in zip(step(case.variants[name]), step(reference), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    benchmark.group = f"{case.operation} {case.shape}"
    benchmark(step, case.variants[name])


def _torch_qkv(q, k, v, tp):
    parts = zip(*(t.chunk(tp) for t in (q, k, v)), strict=True)
    return [torch.cat(part) for part in parts]


@pytest.mark.parametrize("name", ["torch", "ours"])
def test_pack_qkv(benchmark, name) -> None:
    """q, k and v of a layer of 4096 into 8 ranks' packed rows: the native twin beside torch."""
    q, k, v = (torch.randn(rows, 4096).bfloat16() for rows in (4096, 1024, 1024))
    function = {"torch": _torch_qkv, "ours": pack_qkv}[name]
    for ours, expected in zip(function(q, k, v, 8), _torch_qkv(q, k, v, 8), strict=True):
        assert torch.equal(ours, expected)
    benchmark.group = "pack_qkv"
    benchmark(function, q, k, v, 8)


@pytest.mark.parametrize("name", ["torch", "ours"])
def test_shard_columns(benchmark, name) -> None:
    """A row linear's weight into 8 ranks' columns, cast to bf16."""
    weight = torch.randn(4096, 4096)

    def by_torch(weight):
        return [part.bfloat16().contiguous() for part in weight.chunk(8, 1)]

    def ours(weight):
        return shard(weight, 1, 8, dtype=torch.bfloat16)

    function = {"torch": by_torch, "ours": ours}[name]
    for actual, expected in zip(function(weight), by_torch(weight), strict=True):
        assert torch.equal(actual, expected)
    benchmark.group = "shard_columns"
    benchmark(function, weight)
