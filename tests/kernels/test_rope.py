"""rope_qkv against its fp64 reference, forward and backward, apart and in place."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from nanotron_fast.kernels.rope import (
    operators,
    rope_qkv,
    rope_qkv_,
    rope_qkv_backward,
    rope_qkv_backward_,
    rope_qkv_reference,
    rope_tables,
)
from tests.kernels.checks import assert_close, wide

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NUM_POSITIONS = 40
# (tokens, query heads, key heads, head_dim, share that turns)
SIZES = [
    (5, 4, 1, 16, 1.0),
    (37, 3, 3, 24, 0.5),
    (9, 8, 2, 64, 1.0),
    (3, 16, 2, 80, 0.4),
    (1, 1, 1, 2, 1.0),
    (0, 2, 1, 16, 1.0),
]


def make(tokens, num_q_heads, num_kv_heads, head_dim, share, dtype, device):
    """qkv, the tables, gradients of q, k and v."""
    cos, sin = rope_tables(head_dim, NUM_POSITIONS, partial_rotary_factor=share, device=device)
    heads = (num_q_heads, num_kv_heads, num_kv_heads)
    qkv = torch.randn(tokens, sum(heads) * head_dim, device=device).to(dtype)
    grads = [torch.randn(tokens, n, head_dim, device=device).to(dtype) for n in heads]
    return qkv, cos, sin, grads


def run(qkv, cos, sin, sizes, grads, position_ids, interleaved):
    """q, k, v and dqkv of one call."""
    qkv = qkv.detach().requires_grad_()
    outs = rope_qkv(qkv, cos, sin, *sizes, position_ids, interleaved)
    return *outs, *torch.autograd.grad(outs, qkv, grads)


def run_wide(qkv, cos, sin, sizes, grads, position_ids, interleaved):
    qkv = wide(qkv, True)
    outs = rope_qkv_reference(qkv, wide(cos), wide(sin), *sizes, position_ids, interleaved)
    return *outs, *torch.autograd.grad(outs, qkv, [wide(grad) for grad in grads])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_reference(path, device, size, dtype, interleaved) -> None:
    torch.manual_seed(0)
    qkv, cos, sin, grads = make(*size, dtype, device)
    # Two documents in a row.
    position_ids = torch.arange(size[0], device=device) % 11
    args = (qkv, cos, sin, size[1:4], grads, position_ids, interleaved)
    for ours, reference in zip(run(*args), run_wide(*args), strict=True):
        assert ours.dtype == dtype
        assert ours.is_contiguous()
        assert_close(ours, reference)


@pytest.mark.parametrize("head_dim", range(16, 257, 8))
def test_every_head_dim(triton_path, head_dim) -> None:
    torch.manual_seed(0)
    size = (3, 2, 1, head_dim, 1.0)
    qkv, cos, sin, grads = make(*size, torch.float32, triton_path)
    args = (qkv, cos, sin, size[1:4], grads, None, head_dim % 16 == 0)
    for ours, reference in zip(run(*args), run_wide(*args), strict=True):
        assert_close(ours, reference)


def test_the_formula_itself(path, device) -> None:
    """Position 3 of two pairs, written out: what both references and kernels must agree on."""
    cos, sin = rope_tables(4, 8, theta=100.0, device=device)
    qkv = torch.tensor([[1.0, 2.0, 3.0, 4.0] * 3], device=device)
    position_ids = torch.tensor([3], dtype=torch.int32, device=device)
    c, s = torch.tensor([3.0, 0.3]).cos(), torch.tensor([3.0, 0.3]).sin()
    q, k, v = rope_qkv(qkv, cos, sin, 1, 1, 4, position_ids)
    halves = [1 * c[0] - 3 * s[0], 2 * c[1] - 4 * s[1], 3 * c[0] + 1 * s[0], 4 * c[1] + 2 * s[1]]
    torch.testing.assert_close(q.flatten().cpu(), torch.stack(halves))
    assert torch.equal(q, k)
    assert torch.equal(v.flatten(), qkv[0, 8:])
    q, _, _ = rope_qkv(qkv, cos, sin, 1, 1, 4, position_ids, interleaved=True)
    pairs = [1 * c[0] - 2 * s[0], 2 * c[0] + 1 * s[0], 3 * c[1] - 4 * s[1], 4 * c[1] + 3 * s[1]]
    torch.testing.assert_close(q.flatten().cpu(), torch.stack(pairs))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_in_place(path, device, share, interleaved) -> None:
    torch.manual_seed(0)
    size = (13, 4, 2, 24, share)
    qkv, cos, sin, grads = make(*size, torch.float32, device)
    rest = (cos, sin, *size[1:4], torch.arange(13, device=device) % 5, interleaved)
    q, k, v, dqkv = run(qkv, cos, sin, size[1:4], grads, *rest[5:])
    # Rows of a wider buffer: what lies beside them stays.
    buffer = torch.cat((qkv, torch.full_like(qkv, 7.0)), 1)
    packed = buffer[:, : qkv.shape[1]]
    assert rope_qkv_(packed, *rest) is packed
    assert torch.equal(packed, torch.cat((q, k, v), 1).flatten(1))
    assert torch.all(buffer[:, qkv.shape[1] :] == 7.0)
    gradient = torch.cat(grads, 1).flatten(1)
    assert rope_qkv_backward_(gradient, *rest) is gradient
    assert torch.equal(gradient, dqkv)


@pytest.mark.parametrize("given", [(True, False, False), (False, True, True), (False, False, True)])
def test_a_gradient_that_is_not_there_is_zero(path, device, given) -> None:
    torch.manual_seed(0)
    size = (6, 4, 2, 16, 0.5)
    qkv, cos, sin, grads = make(*size, torch.float32, device)
    zeros = [
        grad if has else torch.zeros_like(grad) for grad, has in zip(grads, given, strict=True)
    ]
    *_, reference = run_wide(qkv, cos, sin, size[1:4], zeros, None, False)
    leaf = qkv.requires_grad_()
    outs = rope_qkv(leaf, cos, sin, *size[1:4])
    used = [(out, grad) for out, grad, has in zip(outs, grads, given, strict=True) if has]
    (dqkv,) = torch.autograd.grad([out for out, _ in used], leaf, [grad for _, grad in used])
    assert_close(dqkv, reference)


def test_inputs_that_are_not_contiguous(triton_path) -> None:
    torch.manual_seed(0)
    size = (7, 4, 2, 24, 1.0)
    qkv, cos, sin, grads = make(*size, torch.float32, triton_path)
    position_ids = torch.randint(0, NUM_POSITIONS, (7,), device=triton_path)
    args = (cos, sin, size[1:4], grads, position_ids, False)
    expected = run_wide(qkv, *args)
    wider = torch.cat((qkv, qkv), 1)[:, : qkv.shape[1]]
    columns = qkv.t().contiguous().t()
    # Gradients as attention gives them: (heads, tokens, d) and (tokens, d, heads) in memory.
    grads = [
        grads[0].transpose(0, 1).contiguous().transpose(0, 1),
        grads[1].transpose(1, 2).contiguous().transpose(1, 2),
        grads[2][:, :, None].expand(-1, -1, 2, -1)[:, :, 1],
    ]
    tables = (torch.stack((cos, sin), -1).unbind(-1), torch.stack((position_ids,) * 2, -1)[:, 0])
    for packed in (wider, columns):
        ours = run(packed, *tables[0], size[1:4], grads, tables[1], False)
        for a, b in zip(ours, expected, strict=True):
            assert_close(a, b)


# How the gradients of (2, 6) tokens lie in memory, sequence by sequence.
LAYOUTS = {
    "in order": lambda grad: grad,
    "heads first": lambda grad: grad.transpose(1, 2).contiguous().transpose(1, 2),
    "sequence first": lambda grad: grad.transpose(0, 1).contiguous().transpose(0, 1),
    "in one tensor": lambda grad: torch.cat((grad, grad), -2)[..., : grad.shape[-2], :],
    "columns first": lambda grad: grad.transpose(1, 3).contiguous().transpose(1, 3),
}


@pytest.mark.parametrize("sequence_first", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_that_lie_apart_are_packed(path, device, dtype, layout, sequence_first) -> None:
    torch.manual_seed(0)
    sizes = (4, 2, 24)
    qkv, cos, sin, grads = make(12, *sizes, 0.5, dtype, device)
    position_ids = torch.randint(0, NUM_POSITIONS, (12,), device=device)
    *_, expected = run(qkv, cos, sin, sizes, grads, position_ids, True)
    given = [LAYOUTS[layout](grad.unflatten(0, (2, 6))) for grad in grads]
    if sequence_first:
        given = [grad.transpose(0, 1) for grad in given]
        position_ids = position_ids.view(2, 6).t().reshape(-1)
        expected = expected.unflatten(0, (2, 6)).transpose(0, 1).flatten(0, 1)
    dqkv = rope_qkv_backward(*given, cos, sin, position_ids, interleaved=True)
    assert dqkv.is_contiguous()
    assert torch.equal(dqkv, expected)


def test_gradients_that_do_not_fit_are_named(device) -> None:
    _, cos, sin, (dq, dk, dv) = make(5, 4, 2, 16, 1.0, torch.float32, device)
    for wrong in (dv[:, :1], dv[:4], dv[..., :8], dv.half()):
        with pytest.raises(ValueError, match=r"rope_qkv_backward: dq \(5, 4, 16\) torch.float32"):
            rope_qkv_backward(dq, dk, wrong, cos, sin)
    with pytest.raises(ValueError, match="5 tokens, tables for 4 positions"):
        rope_qkv_backward(dq, dk, dv, cos[:4], sin[:4])


def test_turning_back_gives_what_was_there(triton_path) -> None:
    """Positions up to 2^17 and values up to 1e4: turning keeps lengths, so errors stay small."""
    cos, sin = rope_tables(64, 131072, theta=500000.0, device=triton_path)
    qkv = 1e4 * torch.randn(4, 3 * 64, device=triton_path)
    position_ids = torch.tensor([0, 1, 65537, 131071], device=triton_path)
    there = rope_qkv_(qkv.clone(), cos, sin, 1, 1, 64, position_ids)
    assert not torch.allclose(there[1:, :64], qkv[1:, :64])
    assert_close(rope_qkv_backward_(there, cos, sin, 1, 1, 64, position_ids), qkv)


def test_saves_nothing_but_the_tables(triton_path) -> None:
    cos, sin = rope_tables(32, 16, device=triton_path)
    position_ids = torch.arange(16, device=triton_path)
    qkv = torch.randn(16, 4 * 32, device=triton_path, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rope_qkv(qkv, cos, sin, 2, 1, 32, position_ids)
    known = {t.data_ptr() for t in (cos, sin, position_ids)}
    assert {t.data_ptr() for t in saved} == known


def test_operators_are_what_torch_expects(triton_path) -> None:
    qkv, cos, sin, grads = make(5, 4, 2, 16, 0.5, torch.float32, triton_path)
    position_ids = torch.arange(5, device=triton_path)
    opcheck(operators.forward.overload, (qkv, cos, sin, 4, 2, 16, position_ids, False))
    opcheck(operators.forward.overload, (qkv, cos, sin, 4, 2, 16, None, True))
    opcheck(operators.backward.overload, (*grads, cos, sin, 4, 2, 16, position_ids, True))
    opcheck(operators.backward.overload, (None, grads[1], None, cos, sin, 4, 2, 16, None, False))
    opcheck(operators.in_place.overload, (qkv, cos, sin, 4, 2, 16, position_ids, False, True))


def test_compiles_without_a_graph_break(path, device) -> None:
    qkv, cos, sin, grads = make(5, 4, 2, 16, 1.0, torch.float32, device)
    position_ids = torch.arange(5, device=device)

    def step(qkv, gradient):
        outs = rope_qkv(qkv, cos, sin, 4, 2, 16, position_ids)
        return *outs, rope_qkv_backward_(gradient.clone(), cos, sin, 4, 2, 16, position_ids)

    gradient = torch.cat(grads, 1).flatten(1)
    qkv.requires_grad_()
    expected = step(qkv, gradient)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(qkv, gradient)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    (dqkv,) = torch.autograd.grad(actual[:3], qkv, grads)
    assert torch.equal(dqkv, expected[3])


def test_a_position_outside_the_tables(torch_path) -> None:
    qkv, cos, sin, _ = make(3, 2, 1, 16, 1.0, torch.float32, "cpu")
    for outside in (NUM_POSITIONS, -1):
        position_ids = torch.tensor([0, outside, 1])
        with pytest.raises(ValueError, match=rf"position {outside}, tables for 40 positions"):
            rope_qkv(qkv, cos, sin, 2, 1, 16, position_ids)


def test_a_position_outside_the_tables_is_nan_in_the_kernel(triton_path) -> None:
    qkv, cos, sin, _ = make(3, 2, 1, 16, 1.0, torch.float32, triton_path)
    position_ids = torch.tensor([0, NUM_POSITIONS, -1], device=triton_path)
    q, k, v = operators.forward(qkv, cos, sin, 2, 1, 16, position_ids, False)
    assert torch.isfinite(q[0]).all()
    assert torch.isnan(q[1:]).all()
    assert torch.isnan(k[1:]).all()
    assert torch.isfinite(v).all()


def test_what_does_not_fit_is_named(device) -> None:
    qkv, cos, sin, _ = make(3, 2, 1, 16, 1.0, torch.float32, device)
    with pytest.raises(ValueError, match=r"qkv \(3, 64\) for 4 \+ 2 \* 1 heads of 16"):
        rope_qkv(qkv, cos, sin, 4, 1, 16)
    with pytest.raises(ValueError, match=r"2 query heads, 0 key heads"):
        rope_qkv(qkv, cos, sin, 2, 0, 32)
    with pytest.raises(ValueError, match=r"cos \(40, 8\) and sin \(39, 8\) for head_dim 16"):
        rope_qkv(qkv, cos, sin[1:], 2, 1, 16)
    with pytest.raises(ValueError, match=r"cos \(40, 8\) and sin \(40, 8\) for head_dim 8"):
        rope_qkv(qkv[:, :32], cos, sin, 2, 1, 8)
    with pytest.raises(ValueError, match=r"cos torch.bfloat16 .* the tables are fp32"):
        rope_qkv(qkv, cos.bfloat16(), sin.bfloat16(), 2, 1, 16)
    with pytest.raises(ValueError, match=r"3 tokens, tables for 2 positions"):
        rope_qkv(qkv, cos[:2], sin[:2], 2, 1, 16)
    with pytest.raises(ValueError, match=r"position_ids \(2,\) torch.int64 for 3 tokens"):
        rope_qkv(qkv, cos, sin, 2, 1, 16, torch.arange(2, device=device))
    with pytest.raises(ValueError, match=r"rope_qkv_ writes over its input and has no gradient"):
        rope_qkv_(qkv.clone().requires_grad_(), cos, sin, 2, 1, 16)
    with pytest.raises(ValueError, match=r"rope_qkv: qkv is torch.int64"):
        rope_qkv(qkv.long(), cos, sin, 2, 1, 16)
    with pytest.raises(ValueError, match=r"rope_qkv_: qkv torch.float32 .* strides \(0, 1\)"):
        rope_qkv_(qkv[:1].expand(3, -1), cos, sin, 2, 1, 16)
    with pytest.raises(ValueError, match=r"rope_qkv_backward: dq \(64,\)"):
        rope_qkv_backward(qkv[0], qkv[0], qkv[0], cos, sin)
    with pytest.raises(ValueError, match=r"rope_qkv_: the rows of qkv are not contiguous"):
        rope_qkv_(qkv.t().contiguous().t(), cos, sin, 2, 1, 16)
