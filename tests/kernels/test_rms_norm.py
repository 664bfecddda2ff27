"""RMSNorm against its fp64 reference, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from nanotron_fast.kernels.rms_norm import operators, rms_norm, rms_norm_reference
from nanotron_fast.kernels.runtime import occupancy, tuning
from nanotron_fast.kernels.runtime.backend import is_interpreting
from tests.kernels.checks import assert_close, wide

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 3), (3, 7), (5, 64), (2, 3, 100), (33, 129), (0, 16), (2, 5000)]


def run(x, weight, residual, dy, dh, **options):
    """Outputs and gradients of one call."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, residual) if t is not None]
    x, weight, residual = (*leaves, None)[:3]
    out = rms_norm(x, weight, 1e-5, residual, **options)
    outs, grads = (out, (dy, dh)) if residual is not None else ((out,), (dy,))
    return outs, torch.autograd.grad(outs, leaves, grads)


def run_wide(x, weight, residual, dy, dh, **options):
    leaves = [wide(t, True) for t in (x, weight, residual) if t is not None]
    x64, weight64, residual64 = (*leaves, None)[:3]
    if residual is not None:
        # The sum is rounded before it is normed; its gradient passes straight through.
        rounding = wide(x + residual) - (x64 + residual64).detach()
        h = x64 + residual64 + rounding
        outs = (rms_norm_reference(h, weight64, 1e-5, None, **options), h)
        return outs, torch.autograd.grad(outs, leaves, (wide(dy), wide(dh)))
    outs = (rms_norm_reference(x64, weight64, 1e-5, None, **options),)
    return outs, torch.autograd.grad(outs, leaves, (wide(dy),))


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(path, device, shape, dtype, has_residual, zero_centered) -> None:
    torch.manual_seed(0)
    x, residual, dy, dh = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    weight = torch.randn(shape[-1], device=device).to(dtype)
    if not has_residual:
        residual = None
    outs, grads = run(x, weight, residual, dy, dh, zero_centered=zero_centered)
    outs64, grads64 = run_wide(x, weight, residual, dy, dh, zero_centered=zero_centered)
    for ours, reference in zip(outs, outs64, strict=True):
        assert ours.dtype == dtype
        # With a residual y carries the rounding of h too, which the interpreter truncates.
        assert_close(ours, reference, factor=2 if has_residual else 1)
    for ours, reference in zip(grads, grads64, strict=True):
        # Two roundings on the path of plain torch: of the norm's gradient, and of its sum with dh.
        assert_close(ours, reference, factor=2)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Launches are made anew, and those that are made in between are not kept."""
    tuning.forget()
    yield
    tuning.forget()


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_leave_no_registers_for_the_weight(
    triton_path, monkeypatch, forgotten, dtype, stages
) -> None:
    asked = []

    def those_that_fit(block_bytes: int, cols: int, copy_bytes: int, device: torch.device) -> int:
        asked.append(block_bytes)
        limit = occupancy.shared_memory_limit(device)
        fit = is_interpreting() or (stages - 1) * block_bytes < limit
        return stages if fit else 1

    monkeypatch.setattr(operators, "_stages", those_that_fit)
    torch.manual_seed(0)
    # Programs have several rows each, and the last ones fewer.
    given = [torch.randn(7, 8232, device=triton_path).to(dtype)[:, :8225] for _ in range(4)]
    weight = torch.randn(8225, device=triton_path).to(dtype)
    for residual, zero_centered in ((None, True), (given[1], False)):
        case = (given[0], weight, residual, *given[2:])
        results = run(*case, zero_centered=zero_centered)
        again = run(*case, zero_centered=zero_centered)
        references = run_wide(*case, zero_centered=zero_centered)
        for all_ours, all_again, all_references in zip(results, again, references, strict=True):
            for ours, twice, reference in zip(all_ours, all_again, all_references, strict=True):
                assert torch.equal(ours, twice)
                assert_close(ours, reference, factor=2)
    assert len(asked) == 2


WIDE = [(1, 16385), (3, 18432), (2, 2, 20001), (7, 32768), (2, 65536), (0, 20000)]


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_rows_that_do_not_fit_in_a_block(
    triton_path, monkeypatch, forgotten, shape, dtype, has_residual
) -> None:
    # Of the parts of rows of 16385 columns four programs each, of those of 65536 one.
    monkeypatch.setattr(occupancy, "resident_programs", lambda *launch: 36)
    torch.manual_seed(0)
    x, residual, dy, dh = (torch.randn(shape, device=triton_path).to(dtype) for _ in range(4))
    case = (x, torch.randn(shape[-1], device=triton_path).to(dtype))
    case = (*case, residual if has_residual else None, dy, dh)
    results = run(*case, zero_centered=has_residual)
    again = run(*case, zero_centered=has_residual)
    references = run_wide(*case, zero_centered=has_residual)
    assert results[0][0].grad_fn.name() == "_RmsNormBackward"
    for all_ours, all_again, all_references in zip(results, again, references, strict=True):
        for ours, twice, reference in zip(all_ours, all_again, all_references, strict=True):
            assert ours.dtype == dtype
            assert torch.equal(ours, twice)
            assert_close(ours, reference, factor=2)


def test_wide_rows_that_are_not_contiguous(triton_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2 * 17000, device=triton_path)[:, ::2]
    residual = torch.randn(5, 17024, device=triton_path)[:, :17000]
    weight = torch.randn(17000, device=triton_path)
    dy = torch.randn(17000, 5, device=triton_path).t()
    dh = torch.randn(5, 17008, device=triton_path)[:, 8:]
    outs, grads = run(x, weight, residual, dy, dh)
    outs64, grads64 = run_wide(x, weight, residual, dy, dh)
    assert outs[0].grad_fn.name() == "_RmsNormBackward"
    for ours, reference in zip((*outs, *grads), (*outs64, *grads64), strict=True):
        assert_close(ours, reference)


def test_rows_that_are_not_contiguous(triton_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 40, device=triton_path)[:, ::2]
    residual = torch.randn(6, 64, device=triton_path)[:, :20]
    weight = torch.randn(20, device=triton_path)
    dy, dh = torch.randn(20, 6, device=triton_path).t(), torch.randn(6, 20, device=triton_path)
    outs, grads = run(x, weight, residual, dy, dh)
    outs64, grads64 = run_wide(x, weight, residual, dy, dh)
    for ours, reference in zip((*outs, *grads), (*outs64, *grads64), strict=True):
        assert_close(ours, reference)


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_extremes(path, device, scale) -> None:
    x = torch.full((4, 32), scale, device=device)
    weight = torch.ones(32, device=device)
    outs, grads = run(x, weight, None, torch.randn(4, 32, device=device), None)
    outs64, _ = run_wide(x, weight, None, torch.ones(4, 32, device=device), None)
    assert_close(outs[0], outs64[0])
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_an_fp32_weight_under_bf16(triton_path) -> None:
    x = torch.randn(4, 32, device=triton_path).bfloat16()
    weight = torch.randn(32, device=triton_path)
    dy = torch.randn_like(x)
    outs, (dx, dw) = run(x, weight, None, dy, None)
    outs64, (dx64, dw64) = run_wide(x, weight, None, dy, None)
    assert outs[0].dtype == dx.dtype == torch.bfloat16
    assert dw.dtype == torch.float32
    assert_close(outs[0], outs64[0])
    assert_close(dx, dx64)
    assert_close(dw, dw64, factor=2)


def test_only_the_sum_has_a_gradient(path, device) -> None:
    x, residual = (torch.randn(3, 8, device=device, requires_grad=True) for _ in range(2))
    _, h = rms_norm(x, torch.ones(8, device=device), residual=residual)
    h.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(residual.grad, torch.ones_like(x))


def test_saves_its_input_and_a_number_a_row(triton_path) -> None:
    x = torch.randn(16, 64, device=triton_path).bfloat16().requires_grad_()
    weight = torch.randn(64, device=triton_path).bfloat16().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, weight)
    sizes = sum(t.numel() * t.element_size() for t in saved)
    assert sizes <= x.numel() * 2 + weight.numel() * 2 + 16 * 4


def test_operators_are_what_torch_expects(triton_path) -> None:
    x, residual, dy = (torch.randn(5, 12, device=triton_path) for _ in range(3))
    weight = torch.randn(12, device=triton_path)
    torch.library.opcheck(operators.forward.overload, (x, residual, weight, 1e-6, False))
    torch.library.opcheck(operators.forward.overload, (x, None, weight, 1e-6, True))
    rstd = torch.rand(5, device=triton_path)
    torch.library.opcheck(operators.backward.overload, (dy, None, x, weight, rstd, False))


def test_compiles_without_a_graph_break(path, device) -> None:
    x, residual = (torch.randn(5, 12, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(12, device=device, requires_grad=True)
    expected = rms_norm(x, weight, residual=residual)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    actual = compiled(x, weight, residual=residual)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    sum(t.square().sum() for t in actual).backward()
    grads = [t.grad.clone() for t in (x, residual, weight)]
    reference = torch.autograd.grad(sum(t.square().sum() for t in expected), (x, residual, weight))
    for a, b in zip(grads, reference, strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_without_a_residual(path, device) -> None:
    x = torch.randn(5, 12, device=device, requires_grad=True)
    weight = torch.randn(12, device=device, requires_grad=True)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, rms_norm):
        y = function(x, weight)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_what_does_not_fit_is_named(device) -> None:
    x = torch.randn(3, 8, device=device)
    for other, weight, named in (
        (x, torch.ones(9), r"weight \(9,\) torch.float32 for x \(3, 8\) torch.float32"),
        (x, torch.ones(8, dtype=torch.int32), r"weight \(8,\) torch.int32 for x \(3, 8\)"),
        (x.long(), torch.ones(8), r"for x \(3, 8\) torch.int64"),
        (x.to(torch.complex64), torch.ones(8), r"for x \(3, 8\) torch.complex64"),
        (x.sum(), torch.ones(()), r"weight \(\) torch.float32 for x \(\)"),
    ):
        with pytest.raises(ValueError, match="rms_norm: .*" + named):
            rms_norm(other, weight.to(device))
    with pytest.raises(ValueError, match=r"residual \(3, 8\) torch.float16 for x \(3, 8\)"):
        rms_norm(x, torch.ones(8, device=device), residual=x.half())


def test_a_wide_row_is_alone_in_its_block_whatever_was_measured(triton_path) -> None:
    x, weight = torch.randn(3, 8200, device=triton_path), torch.randn(8200, device=triton_path)
    expected = run(x, weight, None, torch.ones_like(x), None)

    def pick(kind: type[tuning.Tuned], key: dict[str, int]) -> tuning.Tuned | None:
        is_backward = kind.operation == "rms_norm_backward"
        return replace(kind.rule(**key), rows=2) if is_backward else None

    with tuning.picking(pick):
        found = run(x, weight, None, torch.ones_like(x), None)
    for one, other in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(one, other)
