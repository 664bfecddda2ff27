"""Cross entropy on one rank against its fp64 reference; several ranks: test_loss_parallel."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from nanotron_fast.kernels.cross_entropy import operators as operators
from nanotron_fast.kernels.cross_entropy import (
    vocab_parallel_cross_entropy,
    vocab_parallel_cross_entropy_reference,
)
from tests.kernels.checks import assert_close, wide

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Less than a block, several blocks with an odd rest, one column, leading dimensions, no tokens.
SHAPES = [(5, 7), (3, 1000), (4, 1), (2, 3, 100), (2, 9001), (0, 16)]
# The loss is fp32 whatever the logits are; its sums are of up to 9001 terms.
LOSS = {"factor": 4, "dtype": torch.float32}


def make(shape, dtype=torch.float32, device="cpu", scale=3.0):
    """Logits that are no leaf, as a matrix product's output is none, targets, and dloss."""
    torch.manual_seed(0)
    logits = (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()
    target = torch.randint(shape[-1], shape[:-1], device=device)
    return logits, target, torch.randn(shape[:-1], device=device)


def run(logits, target, dloss, **options):
    """loss, z or None, dlogits."""
    out = vocab_parallel_cross_entropy(logits.clone(), target, **options)
    loss, z = out if isinstance(out, tuple) else (out, None)
    return loss, z, torch.autograd.grad(loss, logits, dloss)[0]


def run_wide(logits, target, dloss, **options):
    leaf = wide(logits, True)
    out = vocab_parallel_cross_entropy_reference(leaf, target, **options)
    loss, z = out if isinstance(out, tuple) else (out, None)
    return loss, z, torch.autograd.grad(loss, leaf, wide(dloss))[0]


def check(logits, target, dloss, **options):
    loss, z, dlogits = run(logits, target, dloss, **options)
    loss64, z64, dlogits64 = run_wide(logits, target, dloss, **options)
    assert loss.dtype == torch.float32
    assert dlogits.dtype == logits.dtype
    assert_close(loss, loss64, **LOSS)
    # fp32: exp() of the device, and a division.
    assert_close(dlogits, dlogits64, factor=2)
    if z64 is not None:
        assert_close(z, z64, **LOSS)
        assert not z.requires_grad
    return loss, z, dlogits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(path, device, shape, dtype) -> None:
    check(*make(shape, dtype, device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("vocab", "beside"), [(1, 0), (7, 0), (8, 1), (9, 7), (16, 13), (23, 0), (2051, 5)]
)
def test_rows_that_begin_anywhere(triton_path, vocab, beside, dtype) -> None:
    """Nine rows at every distance from an aligned address; what lies beside them stays."""
    logits, target, dloss = make((9, vocab), dtype, triton_path)
    loss64, _, dlogits64 = run_wide(logits, target, dloss)
    buffer = torch.full((9, vocab + beside), 7.0, dtype=dtype, device=triton_path)
    view = buffer[:, :vocab]
    view.copy_(logits.detach())
    terms = {"ignore_index": None, "z_loss": 0.0, "add_maximum": False}
    ours = operators.statistics(view, target, first_col=0, ignore_index=None)
    loss, _, rows = operators.combine(ours[None], target, shard_cols=vocab, **terms)
    assert_close(loss, loss64, **LOSS)
    apart = operators.gradient(view, target, rows, dloss, first_col=0, **terms)
    assert_close(apart, dlogits64, factor=2)
    operators.gradient_(view, target, rows, dloss, first_col=0, **terms)
    assert torch.equal(view, apart)
    assert torch.all(buffer[:, vocab:] == 7.0)


@pytest.mark.parametrize("ignore_index", [None, -100, 3])
@pytest.mark.parametrize("mode", ["nanotron", "correct"])
def test_z_loss_and_ignored_tokens(path, device, mode, ignore_index) -> None:
    logits, target, dloss = make((6, 50), device=device)
    target[1], target[4] = -100, 3
    options = {"ignore_index": ignore_index, "z_loss": 0.1, "z_loss_mode": mode}
    loss, z, dlogits = check(logits, target, dloss, **options)
    for row in {None: [], -100: [1], 3: [4]}[ignore_index]:
        assert loss[row] == z[row] == 0
        assert dlogits[row].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16], ids=str)
@pytest.mark.parametrize("vocab", [256, 300, 40000])
def test_targets_of_narrow_dtypes(path, device, vocab, dtype) -> None:
    """Neither the vocabulary nor an ignored id is a number of theirs: -100 is 156 in eight bits."""
    logits, target, dloss = make((3, vocab), device=device)
    target = torch.tensor([0, 127, torch.tensor(-100).to(dtype).item() % vocab], device=device)
    ours = run(logits, target.to(dtype), dloss, ignore_index=-100)
    wanted = run(logits, target.to(dtype).long(), dloss, ignore_index=-100)
    assert torch.equal(ours[0], wanted[0])
    assert torch.equal(ours[2], wanted[2])


def test_nanotron_leaves_the_maximum_out(path, device) -> None:
    logits = torch.tensor([[10.0, 9.0, 8.0]], device=device)
    target = torch.zeros(1, dtype=torch.int64, device=device)
    _, z = vocab_parallel_cross_entropy(logits, target, z_loss=1.0)
    _, correct = vocab_parallel_cross_entropy(logits, target, z_loss=1.0, z_loss_mode="correct")
    log_sum = (logits.double() - 10).exp().sum().log()
    assert_close(z[0], log_sum.square(), factor=2)
    assert_close(correct[0], (10 + log_sum).square(), factor=2)


def test_the_gradient_of_nanotrons_z_loss(path, device) -> None:
    """Written out as Nanotron does, rather than through autograd."""
    logits, target, dloss = make((4, 30), device=device)
    _, _, dlogits = run(logits, target, dloss, z_loss=0.3)
    values = wide(logits)
    log_sum = (values - values.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True).log()
    expected = values.softmax(-1) * (1 + 2 * 0.3 * log_sum)
    expected -= torch.nn.functional.one_hot(target, 30)
    assert_close(dlogits, expected * wide(dloss)[:, None], factor=2)


@pytest.mark.parametrize("target", [-100, 50, 2**31 - 1])
def test_a_target_outside_the_vocabulary(path, device, target) -> None:
    logits, targets, dloss = make((3, 50), device=device)
    targets[1] = target
    loss, _, dlogits = check(logits, targets, dloss)
    log_sum = wide(logits)[1].logsumexp(0) - wide(logits)[1].max()
    assert_close(loss[1], log_sum, factor=2)
    assert_close(dlogits[1], wide(logits)[1].softmax(0) * dloss[1], factor=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_extremes(path, device, dtype) -> None:
    logits, target, dloss = make((5, 3000), dtype, device)
    with torch.no_grad():
        logits[0] *= 1e4
        logits[1] = 7.0
        logits[2] = -1e4
        logits[3, 1:] = float("-inf")
        logits[4, :2048] = float("-inf")
    target[3], target[4] = 0, 2999
    check(logits, target, dloss)


# The interpreter computes inf - inf with numpy, which warns.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_logit_that_is_not_finite_shows(path, device) -> None:
    logits, target, dloss = make((3, 40), device=device)
    with torch.no_grad():
        logits[0, 5] = float("nan")
        logits[1, 5] = float("inf")
        logits[2, 5] = float("-inf")
    target[2] = 5
    loss, _, _ = run(logits, target, dloss)
    assert loss[0].isnan()
    assert loss[1].isnan()
    assert loss[2] == float("inf")
    ignored, _, dlogits = run(logits, target.fill_(-1), dloss, ignore_index=-1)
    assert ignored.count_nonzero() == dlogits.count_nonzero() == 0


@pytest.mark.parametrize("how", ["columns", "rows", "transposed", "expanded"])
def test_logits_that_are_not_contiguous(path, device, how) -> None:
    leaf = torch.randn(8, 60, device=device).requires_grad_()
    view = {
        "columns": lambda t: t[:, ::2],
        "rows": lambda t: t[::2, 3:33],
        "transposed": lambda t: t.t(),
        "expanded": lambda t: t[:1].expand(4, 60),
    }[how]
    logits = view(leaf * 1)
    target = torch.randint(logits.shape[1], (logits.shape[0],), device=device, dtype=torch.int32)
    dloss = torch.randn(target.shape, device=device)
    (ours,) = torch.autograd.grad(vocab_parallel_cross_entropy(logits, target), leaf, dloss)
    leaf64 = wide(leaf, True)
    loss64 = vocab_parallel_cross_entropy_reference(view(leaf64), target)
    assert_close(ours, torch.autograd.grad(loss64, leaf64, wide(dloss))[0], factor=2)


def test_the_gradient_is_written_over_the_logits(path, device) -> None:
    leaf, target, _ = make((4, 30), torch.float16, device)
    logits = leaf * 1
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    loss = vocab_parallel_cross_entropy(logits, target).sum()
    loss.backward(retain_graph=True)
    assert seen == [logits.data_ptr()]
    with pytest.raises(RuntimeError, match="first backward wrote the gradient over the logits"):
        loss.backward()


def test_another_use_of_the_logits_is_not_corrupted_in_silence(path, device) -> None:
    leaf, target, _ = make((4, 30), device=device)
    logits = leaf * 1
    # exp() is recorded first, so its backward comes last and finds its input overwritten.
    loss = logits.square().sum() + vocab_parallel_cross_entropy(logits, target).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = leaf * 1
    loss = logits.square().sum() + vocab_parallel_cross_entropy(logits, target, inplace=False).sum()
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * once)


@pytest.mark.parametrize("is_view", [False, True])
def test_a_leaf_keeps_its_logits(path, device, is_view) -> None:
    leaf, target, _ = make((4, 30), device=device)
    before = leaf.detach().clone()
    logits = leaf.view(2, 2, 30) if is_view else leaf
    vocab_parallel_cross_entropy(logits, target.view(logits.shape[:-1])).sum().backward()
    assert torch.equal(leaf, before)
    assert_close(leaf.grad, run_wide(leaf, target, torch.ones(4, device=device))[2], factor=2)


def test_saves_the_logits_and_two_numbers_a_row(path, device) -> None:
    leaf, target, _ = make((16, 300), torch.bfloat16, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        logits = leaf * 1
        saved.clear()
        vocab_parallel_cross_entropy(logits, target, z_loss=0.1)
    # The targets are the caller's; beside them M and s.
    extra = sum(
        t.nbytes for t in saved if t.data_ptr() not in (logits.data_ptr(), target.data_ptr())
    )
    assert sum(t.nbytes for t in saved) == logits.nbytes + target.nbytes + extra
    assert extra == 16 * 2 * 4


def test_gradcheck(torch_path) -> None:
    logits, target, _ = make((3, 8), torch.float64, torch_path)
    ignored = int(target[0])
    for options in ({}, {"z_loss": 0.2, "z_loss_mode": "correct"}, {"ignore_index": ignored}):
        torch.autograd.gradcheck(
            lambda t, options=options: vocab_parallel_cross_entropy(t, target, **options), logits
        )


def test_operators_are_what_torch_expects(triton_path) -> None:
    logits, target, dloss = make((5, 12), device=triton_path)
    logits = logits.detach()
    for ignore_index, z_loss in ((None, 0.0), (3, 0.1)):
        opcheck(operators.statistics.overload, (logits, target, 0, ignore_index))
        of_all = torch.rand(2, 3, 5, device=triton_path)
        opcheck(operators.combine.overload, (of_all, target, 6, ignore_index, z_loss, True))
        args = (target, of_all[0, :2].clone(), dloss, 0, ignore_index, z_loss, False)
        opcheck(operators.gradient.overload, (logits, *args))
        opcheck(operators.gradient_.overload, (logits.clone(), *args))


def test_compiles_without_a_graph_break(path, device) -> None:
    leaf, target, _ = make((5, 12), device=device)

    def step(leaf):
        loss, z = vocab_parallel_cross_entropy(leaf * 2, target, ignore_index=3, z_loss=0.1)
        return loss.sum(), z

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(leaf), step(leaf), strict=True):
        torch.testing.assert_close(ours, expected)
    loss = compiled(leaf)[0]
    # What is compiled is functional: nothing is overwritten, and backward may run twice.
    torch.autograd.grad(loss, leaf, retain_graph=True)
    (ours,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(ours, torch.autograd.grad(step(leaf)[0], leaf)[0])


def test_what_does_not_fit_is_named(device) -> None:
    logits, target, _ = make((3, 8), device=device)
    cases = [
        (r"target \(2,\) for tokens \(3,\)", (logits, target[:2]), {}),
        (r"target is torch.float32, not whole numbers", (logits, target.float()), {}),
        (r"logits \(3, 0\) torch.float32", (logits[:, :0], target), {}),
        (r"logits \(3, 8\) torch.int64", (logits.long(), target), {}),
        (
            r"z_loss_mode='right': choose nanotron, correct",
            (logits, target),
            {"z_loss_mode": "right"},
        ),
        (r"z_loss=-1.0 is below 0", (logits, target), {"z_loss": -1.0}),
        (r"a group is a ProcessGroup", (logits, target, "tp"), {}),
    ]
    for message, args, options in cases:
        with pytest.raises(ValueError, match=message):
            vocab_parallel_cross_entropy(*args, **options)
