"""Products with a GLU or a rotary epilogue against fp64 references, and the choice of a kernel."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.library import opcheck
from torch.nn.functional import linear

from nanotron_fast.kernels import matmul as module
from nanotron_fast.kernels.glu import ACTIVATIONS, glu_forward
from nanotron_fast.kernels.matmul import choice as matmul_choice
from nanotron_fast.kernels.matmul import (
    matmul_glu,
    matmul_glu_reference,
    matmul_rope,
    matmul_rope_reference,
    operators,
    prefers_fused,
)
from nanotron_fast.kernels.rope import rope_qkv_, rope_tables
from nanotron_fast.kernels.runtime import capture
from tests.kernels.checks import assert_close, wide

# The interpreter's product of bf16 is not one.
DTYPES = [torch.float16, torch.float32]
GPU_DTYPES = [torch.bfloat16, *DTYPES] if torch.cuda.is_available() else DTYPES
# A sum of so many terms in fp32 loses a few bits that one rounding does not; in 16 bits it is lost.
SUM = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 4}
# (tokens, hidden, inter)
GLU_SIZES = [(5, 64, 7), (35, 72, 70), (0, 16, 8), (3, 0, 4), (4, 16, 0)]
# (tokens, hidden, query heads, key heads, head_dim, share that turns)
ROPE_SIZES = [
    (5, 24, 2, 1, 16, 1.0),
    (35, 64, 3, 1, 24, 0.5),
    (3, 48, 4, 4, 80, 0.4),
    (2, 32, 1, 1, 2, 1.0),
    (0, 16, 2, 1, 16, 1.0),
]


def assert_sum_close(ours, reference, factor: float = 1.0) -> None:
    assert_close(ours, reference, factor=factor * SUM[ours.dtype])


def make(rows, cols, dtype, device, scale=1.0):
    return (scale * torch.randn(rows, cols, device=device)).to(dtype)


def make_rope(tokens, hidden, num_q_heads, num_kv_heads, head_dim, share, dtype, device):
    """x, the weight, the bias, the tables and the positions of two documents."""
    rows = (num_q_heads + 2 * num_kv_heads) * head_dim
    cos, sin = rope_tables(head_dim, 20, partial_rotary_factor=share, device=device)
    x, weight = make(tokens, hidden, dtype, device), make(rows, hidden, dtype, device)
    position_ids = torch.arange(tokens, device=device) % 19
    return x, weight, make(1, rows, dtype, device)[0], cos, sin, position_ids


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("size", GLU_SIZES, ids=str)
def test_glu_matches_reference(path, device, size, dtype, activation) -> None:
    torch.manual_seed(0)
    tokens, hidden, inter = size
    x, weight = make(tokens, hidden, dtype, device), make(2 * inter, hidden, dtype, device)
    h, gate_up = matmul_glu(x, weight, activation, save_gate_up=True)
    expected = matmul_glu_reference(wide(x), wide(weight), activation, save_gate_up=True)
    assert h.dtype == gate_up.dtype == dtype
    assert_sum_close(h, expected[0])
    assert_sum_close(gate_up, expected[1])
    assert torch.equal(matmul_glu(x, weight, activation), h)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("size", ROPE_SIZES, ids=str)
def test_rope_matches_reference(path, device, size, dtype, interleaved) -> None:
    torch.manual_seed(0)
    x, weight, bias, cos, sin, position_ids = make_rope(*size, dtype, device)
    sizes = size[2:5]
    tensors = (x, weight, bias, cos, sin)
    qkv = matmul_rope(*tensors, *sizes, position_ids, interleaved)
    tensors = [wide(tensor) for tensor in tensors]
    expected = matmul_rope_reference(*tensors, *sizes, position_ids, interleaved)
    assert qkv.dtype == dtype
    assert_sum_close(qkv, expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_the_usual_heads_without_bias_or_positions(triton_path, head_dim, interleaved) -> None:
    torch.manual_seed(0)
    size = (18, 32, 2, 1, head_dim, 1.0)
    x, weight, _, cos, sin, _ = make_rope(*size, torch.float16, triton_path)
    qkv = matmul_rope(x, weight, None, cos, sin, 2, 1, head_dim, interleaved=interleaved)
    tensors = (wide(x), wide(weight), None, wide(cos), wide(sin))
    assert_close(qkv, matmul_rope_reference(*tensors, 2, 1, head_dim, None, interleaved))


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_differs_from_the_vendors_product_by_its_second_rounding(triton_path, dtype) -> None:
    torch.manual_seed(0)
    x, weight = make(17, 64, dtype, triton_path), make(48, 64, dtype, triton_path)
    h, gate_up = matmul_glu(x, weight, save_gate_up=True)
    product = linear(x, weight)
    assert_sum_close(gate_up, wide(product))
    assert_sum_close(h, wide(glu_forward(product)), factor=3)
    cos, sin = rope_tables(16, 17, device=triton_path)
    qkv = matmul_rope(x, weight, None, cos, sin, 1, 1, 16)
    assert_sum_close(qkv, wide(rope_qkv_(product, cos, sin, 1, 1, 16)), factor=2)


def test_matrices_that_are_not_contiguous(triton_path) -> None:
    torch.manual_seed(0)
    x = make(9, 48, torch.float32, triton_path)[:, :24]
    weight = make(24, 32, torch.float32, triton_path).t()
    assert_sum_close(matmul_glu(x, weight), matmul_glu_reference(wide(x), wide(weight)))
    cos, sin = rope_tables(8, 9, device=triton_path)
    bias = make(32, 2, torch.float32, triton_path)[:, 0]
    tables = [torch.stack((table, table), -1)[..., 0] for table in (cos, sin)]
    qkv = matmul_rope(x, weight, bias, *tables, 2, 1, 8)
    tensors = [wide(tensor) for tensor in (x, weight, bias, cos, sin)]
    assert_sum_close(qkv, matmul_rope_reference(*tensors, 2, 1, 8))


def test_programs_go_over_every_tile(triton_path) -> None:
    """More blocks of rows than a group has, and a last group that is not full."""
    torch.manual_seed(0)
    x, weight = (make(rows, 16, torch.float32, triton_path) for rows in (333, 140))
    assert_sum_close(matmul_glu(x, weight), matmul_glu_reference(wide(x), wide(weight)))


def test_a_weight_that_needs_wide_offsets(triton_path, monkeypatch) -> None:
    """The path of a matrix of 2^31 elements, on a small one."""
    torch.manual_seed(0)
    x, weight = (make(rows, 32, torch.float32, triton_path) for rows in (5, 24))
    expected = matmul_glu(x, weight)
    monkeypatch.setattr(operators, "_is_wide", lambda weight: True)
    assert torch.equal(matmul_glu(x, weight), expected)


def test_a_gate_far_out(path, device) -> None:
    """Gates of +-1e4: the activation is 0 or the gate itself, and nothing is NaN."""
    x = torch.ones(2, 16, device=device)
    weight = torch.cat((torch.full((3, 16), 625.0), -torch.full((3, 16), 625.0), torch.ones(6, 16)))
    for activation in ACTIVATIONS:
        h = matmul_glu(x, weight.to(device), activation)
        expected = torch.tensor([160000.0] * 3 + [0.0] * 3, device=device).expand(2, 6)
        assert_close(h, expected)


def test_a_position_outside_the_tables(triton_path) -> None:
    x, weight, _, cos, sin, _ = make_rope(3, 16, 2, 1, 8, 1.0, torch.float32, triton_path)
    position_ids = torch.tensor([0, 20, -1], device=triton_path)
    qkv = operators.rope_product(x, weight, None, cos, sin, 2, 1, 8, position_ids, False)
    assert torch.isfinite(qkv[0]).all()
    assert torch.isnan(qkv[1:, :24]).all()
    assert torch.isfinite(qkv[:, 24:]).all()


def test_operators_are_what_torch_expects(triton_path) -> None:
    x, weight, bias, cos, sin, position_ids = make_rope(
        3, 16, 2, 1, 8, 1.0, torch.float32, triton_path
    )
    opcheck(operators.glu_product.overload, (x, weight, "silu", False))
    opcheck(operators.glu_product.overload, (x, weight, "gelu", True))
    rest = (cos, sin, 2, 1, 8)
    opcheck(operators.rope_product.overload, (x, weight, bias, *rest, position_ids, False))
    opcheck(operators.rope_product.overload, (x, weight, None, *rest, None, True))


def test_compiles_without_a_graph_break(path, device) -> None:
    x, weight, bias, cos, sin, position_ids = make_rope(3, 16, 2, 1, 8, 1.0, torch.float32, device)

    def step(x):
        return (
            matmul_rope(x, weight, bias, cos, sin, 2, 1, 8, position_ids),
            *matmul_glu(x, weight, save_gate_up=True),
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(x), step(x), strict=True):
        torch.testing.assert_close(ours, expected)


def test_what_does_not_fit_is_named(device) -> None:
    x, weight = torch.randn(3, 8, device=device), torch.randn(12, 8, device=device)
    cos, sin = rope_tables(4, 8, device=device)
    with pytest.raises(ValueError, match=r"x \(3, 8\) for a weight \(8, 12\)"):
        matmul_glu(x, weight.t())
    with pytest.raises(ValueError, match=r"x torch.float32 for a weight torch.float16"):
        matmul_glu(x, weight.half())
    with pytest.raises(ValueError, match=r"matmul_glu: 11 rows have no two equal halves"):
        matmul_glu(x, weight[1:])
    with pytest.raises(ValueError, match=r"activation 'relu': choose silu"):
        matmul_glu(x, weight, "relu")
    with pytest.raises(ValueError, match=r"matmul_rope: qkv \(3, 12\) for 2 \+ 2 \* 1 heads of 4"):
        matmul_rope(x, weight, None, cos, sin, 2, 1, 4)
    with pytest.raises(ValueError, match=r"bias \(11,\) for a weight \(12, 8\)"):
        matmul_rope(x, weight, weight[1:, 0], cos, sin, 1, 1, 4)
    with pytest.raises(ValueError, match=r"3 tokens, tables for 2 positions"):
        matmul_rope(x, weight, None, cos[:2], sin[:2], 1, 1, 4)


@pytest.fixture
def timed(monkeypatch) -> list[str]:
    """A CPU that is measured like a GPU, by a clock on which the fused kernel always wins.

    Gives what was run: "vendor" or "fused", in turn.
    """
    runs: list[str] = []
    make_candidates = module._candidates

    def named(key):
        vendor, fused = make_candidates(key)
        outs = [out[0] if isinstance(out, tuple) else out for out in (fused(), vendor())]
        assert_sum_close(outs[0], wide(outs[1]), factor=3)
        return (lambda: runs.append("vendor")), (lambda: runs.append("fused"))

    def milliseconds(run):
        run()
        return 2.0 if runs[-1] == "vendor" else 1.0

    monkeypatch.delenv(matmul_choice.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(matmul_choice, "_decisions", {})
    monkeypatch.setattr(matmul_choice, "_is_measured_on", lambda device: True)
    monkeypatch.setattr(capture, "is_capturing", lambda device: False)
    monkeypatch.setattr(matmul_choice, "_milliseconds", milliseconds)
    monkeypatch.setattr(module, "_candidates", named)
    return runs


def ask(tokens=100, kind="glu", out=32):
    return prefers_fused(kind, tokens, 64, out, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("kind", module.KINDS)
def test_a_shape_is_measured_once(timed, kind) -> None:
    assert ask(kind=kind)
    assert timed.count("fused") == timed.count("vendor") > 3
    before = len(timed)
    assert ask(kind=kind)
    assert ask(128, kind)  # the same power of two
    assert len(timed) == before
    assert ask(129, kind)
    assert len(timed) == 2 * before
    assert ask(kind=kind, out=48)
    assert len(timed) == 3 * before


def test_it_is_timed_on_its_own_device(timed, monkeypatch) -> None:
    current = []

    @contextmanager
    def on_device(index):
        current.append(index)
        yield
        current.append(len(timed))

    monkeypatch.setattr(matmul_choice, "on_device", on_device)
    key = matmul_choice.Key("glu", 16, 64, 32, torch.float32, torch.device("cuda", 3))
    vendor, fused = (lambda: timed.append("vendor")), (lambda: timed.append("fused"))
    assert matmul_choice.choose(key, lambda: (vendor, fused))
    assert current == [3, len(timed)]


def test_the_slower_kernel_is_not_taken(timed, monkeypatch) -> None:
    times = iter([1.0, 3.0] * 100)
    monkeypatch.setattr(matmul_choice, "_milliseconds", lambda run: next(times))
    assert not ask()
    assert matmul_choice._decisions  # a loss is kept too
    assert not ask()


def test_what_does_not_fit_in_memory_is_not_taken(timed, monkeypatch) -> None:
    def fail(*shape):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(module, "_candidates", fail)
    assert not ask()


def test_nothing_is_timed_while_a_graph_is_captured(timed, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(capture, "is_capturing", lambda device: True)
        assert not ask()
        assert not timed
    assert ask()
    monkeypatch.setattr(capture, "is_capturing", lambda device: True)
    assert ask()


def test_nothing_is_timed_while_torch_traces(timed) -> None:
    def step(x):
        fused = prefers_fused("glu", x.shape[0], 64, 32, x.dtype, x.device)
        return x + 1 if fused else x - 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(torch.zeros(100, 64)), torch.full((100, 64), -1.0))
    assert not timed
    assert ask()
    torch.compiler.reset()
    assert torch.equal(compiled(torch.zeros(100, 64)), torch.full((100, 64), 1.0))


def test_the_environment_decides(monkeypatch) -> None:
    monkeypatch.delenv(matmul_choice.ENVIRONMENT_VARIABLE, raising=False)
    assert not ask()  # the CPU
    monkeypatch.setenv(matmul_choice.ENVIRONMENT_VARIABLE, "always")
    assert ask()
    monkeypatch.setenv(matmul_choice.ENVIRONMENT_VARIABLE, "never")
    assert not ask()
    monkeypatch.setenv(matmul_choice.ENVIRONMENT_VARIABLE, "sometimes")
    with pytest.raises(ValueError, match=r"FUSED_MATMUL=sometimes: choose auto, always, never"):
        ask()
    with pytest.raises(ValueError, match=r"prefers_fused: 'mlp': choose glu, glu_save, rope"):
        ask(kind="mlp")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: it times kernels")
@pytest.mark.parametrize("kind", module.KINDS)
def test_a_gpu_measures(kind, monkeypatch) -> None:
    monkeypatch.delenv(matmul_choice.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(matmul_choice, "_decisions", {})
    device = torch.device("cuda", torch.cuda.current_device())
    state = torch.cuda.get_rng_state()
    first = prefers_fused(kind, 512, 1024, 2048, torch.bfloat16, device)
    assert matmul_choice._decisions == {(kind, 512, 1024, 2048, torch.bfloat16, device): first}
    assert torch.equal(torch.cuda.get_rng_state(), state)
