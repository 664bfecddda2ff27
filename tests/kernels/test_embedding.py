"""Embedding on one rank against its fp64 reference; several ranks: test_loss_parallel."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from nanotron_fast.kernels.embedding import (
    operators,
    vocab_parallel_embedding,
    vocab_parallel_embedding_reference,
)
from nanotron_fast.kernels.runtime import tuning
from tests.kernels.checks import assert_close, wide

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [((5,), 7, 3), ((2, 9), 30, 64), ((3, 2, 2), 5, 100), ((0,), 4, 8), ((7,), 3, 5000)]


def make(shape, vocab, hidden, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    ids = torch.randint(vocab, shape, device=device)
    weight = torch.randn(vocab, hidden, device=device).to(dtype).requires_grad_()
    return ids, weight, torch.randn(*shape, hidden, device=device).to(dtype)


def check(ids, weight, dy, **options):
    out = vocab_parallel_embedding(ids, weight, **options)
    weight64 = wide(weight, True)
    out64 = vocab_parallel_embedding_reference(ids, weight64, **options)
    assert out.dtype == weight.dtype
    assert torch.equal(out.double(), out64)
    (dweight,) = torch.autograd.grad(out, weight, dy)
    assert_close(dweight, torch.autograd.grad(out64, weight64, wide(dy))[0])
    return dweight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "vocab", "hidden"), SHAPES, ids=str)
def test_matches_reference(path, device, shape, vocab, hidden, dtype) -> None:
    check(*make(shape, vocab, hidden, dtype, device))


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64], ids=str
)
def test_any_whole_numbers(path, device, dtype) -> None:
    ids, weight, dy = make((2, 9), 30, 16, device=device)
    check(ids.to(dtype), weight, dy)


@pytest.fixture
def pieces_of_8():
    blocks = operators._SumBlocks(cols=16, piece=8, tokens=8, num_warps=4)
    with tuning.picking(lambda kind, key: blocks if kind is operators._SumBlocks else None):
        yield


@pytest.mark.parametrize(
    "ids",
    [
        [3] * 40,  # one id over many pieces
        [0] * 9 + [1] * 23 + [2] * 8,  # ids that end and begin inside pieces
        [0] * 8 + [1] * 16 + [2] * 8 + [3] * 3,  # ids that end where pieces do
        [4, 0, 4, 1, 4, 2, 4] * 6,  # scattered
        list(range(5)) * 2,
    ],
    ids=str,
)
@pytest.mark.parametrize("hidden", [12, 13, 14])
def test_ids_that_stand_often(triton_path, pieces_of_8, ids, hidden) -> None:
    """Every way in which an id can lie over pieces, in rows that begin anywhere."""
    torch.manual_seed(0)
    ids = torch.tensor(ids, device=triton_path)
    _, weight, dy = make(ids.shape, 5, hidden, device=triton_path)
    dweight = check(ids, weight, dy)
    check(ids, weight, dy, padding_idx=int(ids[0]))
    total = torch.ones_like(weight)
    operators.add_by_id(total, dy, ids, 0, None)
    assert torch.equal(total, 1 + dweight)


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adds_to_a_main_gradient(path, device, dtype, padding_idx) -> None:
    """In fp32, whatever the weight's dtype; twice, as two micro-batches do."""
    ids, weight, dy = make((2, 9), 30, 16, dtype, device)
    weight.main_grad = torch.ones(weight.shape, device=device)
    for _ in range(2):
        vocab_parallel_embedding(ids, weight, padding_idx=padding_idx).backward(dy)
    assert weight.grad is None
    weight64 = wide(weight, True)
    out64 = vocab_parallel_embedding_reference(ids, weight64, padding_idx=padding_idx)
    (dweight,) = torch.autograd.grad(out64, weight64, wide(dy))
    assert_close(weight.main_grad, 1 + 2 * dweight)


def test_the_order_of_sums_is_fixed(triton_path) -> None:
    """Tokens of an id are added as they stand: 1e8 first, so that a later 1 is lost, or not."""
    weight = torch.zeros(2, 1, device=triton_path, requires_grad=True)
    for values, expected in (([1e8, 1.0, -1e8], 0.0), ([1e8, -1e8, 1.0], 1.0)):
        ids = torch.ones(24, dtype=torch.int64, device=triton_path)
        dy = torch.zeros(24, 1, device=triton_path)
        # A multiple of 8 apart: one after the other, not in one sum over a block.
        dy[::8, 0] = torch.tensor(values, device=triton_path)
        (dweight,) = torch.autograd.grad(vocab_parallel_embedding(ids, weight), weight, dy)
        assert dweight[1].item() == expected


def test_the_row_of_padding_has_no_gradient(path, device) -> None:
    ids, weight, dy = make((4, 8), 6, 10, device=device)
    ids[0] = 2
    dweight = check(ids, weight, dy, padding_idx=2)
    assert dweight[2].count_nonzero() == 0
    assert dweight[3].count_nonzero() > 0


def test_inputs_that_are_not_contiguous(path, device) -> None:
    ids = torch.randint(9, (6, 8), device=device).t()[::2]
    leaf = torch.randn(7, 18, device=device).requires_grad_()
    dy = torch.randn(7, 4, 6, device=device).permute(1, 2, 0)
    out = vocab_parallel_embedding(ids, leaf.t()[::2])
    leaf64 = wide(leaf, True)
    out64 = vocab_parallel_embedding_reference(ids, leaf64.t()[::2])
    assert torch.equal(out.double(), out64)
    (ours,) = torch.autograd.grad(out, leaf, dy)
    assert_close(ours, torch.autograd.grad(out64, leaf64, wide(dy))[0])


@pytest.mark.parametrize("where", [(slice(None), 1), (slice(None), slice(1, 2))], ids=str)
def test_ids_that_are_a_column(path, device, where) -> None:
    """Of the tokens of a step, say: their view as one row has a stride."""
    _, weight, dy = make((5,), 9, 8, device=device)
    ids = torch.arange(15, device=device).view(5, 3).remainder(9)[where]
    check(ids, weight, dy.view(*ids.shape, 8))


@pytest.mark.parametrize("of_main_grad", [False, True], ids=["weight", "and main_grad"])
def test_a_weight_that_is_not_contiguous_has_its_main_gradient(path, device, of_main_grad) -> None:
    ids, weight, dy = make((4, 8), 9, 6, device=device)
    dweight = check(ids, weight, dy)
    turned = weight.detach().t().contiguous().t().requires_grad_()
    turned.main_grad = torch.ones_like(turned if of_main_grad else weight)
    vocab_parallel_embedding(ids, turned).backward(dy)
    assert turned.grad is None
    assert_close(turned.main_grad - 1, dweight, factor=2)


def test_padding_that_a_narrow_dtype_does_not_have(path, device) -> None:
    """300 is 44 in eight bits."""
    _, weight, dy = make((3,), 301, 8, device=device)
    check(torch.tensor([44, 2, 44], dtype=torch.uint8, device=device), weight, dy, padding_idx=300)


def test_a_rank_gathers_zeros_for_the_ids_of_others(path, device) -> None:
    ids = torch.tensor([0, 4, 5, 9, 10, 14], device=device)
    weight = torch.randn(5, 6, device=device) + 10
    out = operators.gather(ids, weight, 5, 15)
    expected = torch.zeros(6, 6, device=device)
    expected[2], expected[3] = weight[0], weight[4]
    assert torch.equal(out, expected)
    dweight = operators.sum_by_id(torch.ones(6, 6, device=device), ids, 5, 5, None)
    assert dweight.sum(1).tolist() == [6, 0, 0, 0, 6]
    operators.add_by_id(dweight, torch.ones(6, 6, device=device), ids, 5, None)
    assert dweight.sum(1).tolist() == [12, 0, 0, 0, 12]


@pytest.mark.parametrize("wrong", [-1, 30])
def test_an_id_outside_the_vocabulary(path, device, wrong) -> None:
    ids, weight, dy = make((4, 3), 30, 8, device=device)
    ids[2, 1] = wrong
    if device.type == "cpu":
        with pytest.raises(IndexError, match=f"id {wrong} for a vocabulary of 30"):
            vocab_parallel_embedding(ids, weight)
        return
    out = vocab_parallel_embedding(ids, weight)
    assert out[2, 1].count_nonzero() == 0
    torch.autograd.grad(out, weight, dy)


def test_saves_the_ids_alone(path, device) -> None:
    ids, weight, _ = make((4, 3), 30, 8, device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        vocab_parallel_embedding(ids, weight)
    assert [t.data_ptr() for t in saved] == [ids.data_ptr()]


def test_gradcheck(torch_path) -> None:
    ids, weight, _ = make((2, 3), 4, 3, torch.float64, torch_path)
    torch.autograd.gradcheck(lambda w: vocab_parallel_embedding(ids, w), weight)


def test_operators_are_what_torch_expects(path, device) -> None:
    ids, weight, dy = make((6,), 5, 4, device=device)
    opcheck(operators.gather.overload, (ids, weight.detach(), 0, 5))
    opcheck(operators.sum_by_id.overload, (dy, ids, 5, 0, None))
    opcheck(operators.sum_by_id.overload, (dy, ids, 3, 1, 2))
    opcheck(operators.add_by_id.overload, (torch.zeros(3, 4, device=device), dy, ids, 1, 2))


def test_compiles_without_a_graph_break(path, device) -> None:
    ids, weight, dy = make((2, 5), 9, 12, device=device)
    compiled = torch.compile(vocab_parallel_embedding, fullgraph=True, backend="aot_eager")
    out, expected = compiled(ids, weight), vocab_parallel_embedding(ids, weight)
    assert torch.equal(out, expected)
    (ours,) = torch.autograd.grad(out, weight, dy)
    assert torch.equal(ours, torch.autograd.grad(expected, weight, dy)[0])


def test_what_does_not_fit_is_named(device) -> None:
    ids, weight, _ = make((4,), 5, 3, device=device)
    cases = [
        (r"mode='sum': choose all_reduce, reduce_scatter", (ids, weight), {"mode": "sum"}),
        (r"ids are torch.float32, not whole numbers", (ids.float(), weight), {}),
        (r"weight \(15,\) torch.float32", (ids, weight.view(-1)), {}),
        (r"ids \(\) do not split along dim 0", (ids[0], weight), {"mode": "reduce_scatter"}),
        (r"padding_idx=5 for a vocabulary of 5", (ids, weight), {"padding_idx": 5}),
        (r"padding_idx=-1 for a vocabulary of 5", (ids, weight), {"padding_idx": -1}),
    ]
    for message, args, options in cases:
        with pytest.raises(ValueError, match=message):
            vocab_parallel_embedding(*args, **options)
