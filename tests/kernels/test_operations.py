"""What every operation must do: match its reference, compile, and be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from nanotron_fast.kernels import pack
from tests.kernels.operations import OPERATIONS, Operation, run

every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.name)
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def skip_without_native_code(operation: Operation) -> None:
    if operation.name == "pack":
        pytest.importorskip("nanotron_fast._C", reason="the native code is not built")


def reference(operation: Operation, monkeypatch: pytest.MonkeyPatch, device: torch.device):
    """What the references give for the same tensors."""
    with monkeypatch.context() as patch:
        patch.setenv("NANOTRON_FAST_BACKEND", "torch")
        found = run(operation.call, operation.make(device))
    return [tensor.detach().clone() for tensor in found]


def assert_same(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(ours) == len(expected)
    for found, wanted in zip(ours, expected, strict=True):
        assert found.device == wanted.device
        torch.testing.assert_close(found.detach(), wanted, rtol=2e-3, atol=2e-4)


@pytest.mark.versions
@every_operation
def test_kernels_agree_with_the_reference(operation, triton_path, monkeypatch) -> None:
    skip_without_native_code(operation)
    expected = reference(operation, monkeypatch, triton_path)
    assert_same(run(operation.call, operation.make(triton_path)), expected)


def elsewhere(tensor: Tensor, layout: str) -> Tensor:
    """The same values: two elements past an aligned address, with gaps, or turned round."""
    values = tensor.detach()
    if layout == "offset":
        out = values.new_zeros(values.numel() + 2)[2:].view(values.shape)
    elif layout == "gaps":
        out = values.new_zeros(*values.shape, 2)[..., 1]
    else:
        axes = range(values.dim() - 1, -1, -1)
        out = values.permute(*axes).contiguous().permute(*axes)
    return out.copy_(values).requires_grad_(tensor.requires_grad)


# Lists of tensors are contiguous.
LAYOUTS = [
    (operation, layout)
    for operation in OPERATIONS
    for layout in ("offset", "gaps", "turned")
    if layout == "offset" or operation.name not in ("adamw", "accumulate", "clip")
]


@pytest.mark.parametrize(
    ("operation", "layout"), LAYOUTS, ids=[f"{each.name}-{layout}" for each, layout in LAYOUTS]
)
def test_where_values_lie_does_not_matter(operation, layout, triton_path, monkeypatch) -> None:
    skip_without_native_code(operation)
    expected = reference(operation, monkeypatch, triton_path)
    tensors = [elsewhere(tensor, layout) for tensor in operation.make(triton_path)]
    assert_same(run(operation.call, tensors), expected)


@every_operation
def test_is_recomputed(operation, triton_path) -> None:
    """What was saved for a backward pass can be asked for once where it is computed again."""
    skip_without_native_code(operation)

    def recomputed(*tensors: Tensor) -> Tensor | Sequence[Tensor]:
        return checkpoint(operation.call, *tensors, use_reentrant=False)

    expected = [tensor.clone() for tensor in run(operation.call, operation.make(triton_path))]
    assert_same(run(recomputed, operation.make(triton_path)), expected)


@every_operation
@pytest.mark.parametrize("path", ["triton", "auto"])
def test_is_traced_with_sizes_that_are_symbols(operation, path, triton_path, monkeypatch) -> None:
    skip_without_native_code(operation)
    expected = reference(operation, monkeypatch, triton_path)
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", path)
    traced = make_fx(partial(run, operation.call), tracing_mode="symbolic")
    graph = traced(operation.make(triton_path))
    with torch.no_grad():  # the backward pass is in the graph
        assert_same(graph(operation.make(triton_path)), expected)


@pytest.mark.gpu
@no_gpu
@every_operation
def test_compiles(operation, triton_path, monkeypatch) -> None:
    skip_without_native_code(operation)
    expected = reference(operation, monkeypatch, triton_path)
    compiled = torch.compile(operation.call, fullgraph=True, dynamic=False)
    assert_same(run(compiled, operation.make(triton_path)), expected)


@pytest.mark.gpu
@no_gpu
@every_operation
def test_is_captured_in_a_graph(operation, triton_path, monkeypatch) -> None:
    """Warmed up on a side stream, as torch asks; the replay reads what the tensors hold then."""
    skip_without_native_code(operation)
    if operation.name == "pack":
        monkeypatch.setenv("NANOTRON_FAST_BACKEND", "auto")
        path, why = pack.explain(triton_path)
        if path != "cuda":  # Triton's copies its table from the host, which no graph can hold
            pytest.skip(f"the CUDA packer is not here: {why}")
    expected = reference(operation, monkeypatch, triton_path)
    tensors, fresh = operation.make(triton_path), operation.make(triton_path)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(operation.call, tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(operation.call, tensors)
    with torch.no_grad():
        for tensor, value in zip(tensors, fresh, strict=True):
            tensor.copy_(value)
    # What the capture borrowed and gave back must not be what a replay reads.
    scratch = torch.full((1 << 20,), float("nan"), device=triton_path)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, expected)
    del scratch
