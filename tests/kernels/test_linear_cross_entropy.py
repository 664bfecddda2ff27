"""Linear layer and cross entropy in chunks, on one rank; several ranks: test_loss_parallel."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanotron_fast.kernels import linear_cross_entropy as linear
from nanotron_fast.kernels.linear_cross_entropy import (
    REDUCTIONS,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from nanotron_fast.kernels.linear_cross_entropy import operators as operators
from tests.kernels.checks import assert_close, wide

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# In several chunks, or in one, whose logits wait for backward.
both_ways = pytest.mark.parametrize("chunk_tokens", [4, None])


def make(tokens=11, hidden=24, vocab=101, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    x = torch.randn(tokens, hidden, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, hidden, device=device) * 0.3).to(dtype).requires_grad_()
    target = torch.randint(vocab, (tokens,), device=device)
    return x, weight, target


def run(function, x, weight, target, dloss=None, **options):
    """loss, z or None, dhidden, dweight."""
    out = function(x, weight, target, **options)
    loss, z = out if isinstance(out, tuple) else (out, None)
    dloss = torch.full_like(loss, 0.7) if dloss is None else dloss.to(loss.dtype)
    return loss, z, *torch.autograd.grad(loss, (x, weight), dloss)


def check(x, weight, target, dloss=None, **options):
    ours = run(linear_cross_entropy, x, weight, target, dloss, **options)
    options.pop("chunk_tokens", None)
    theirs = run(
        linear_cross_entropy_reference, wide(x, True), wide(weight, True), target, dloss, **options
    )
    assert ours[0].dtype == torch.float32
    assert ours[2].dtype == ours[3].dtype == x.dtype
    for (a, b), factor in zip(zip(ours, theirs, strict=True), (4, 4, 3, 3), strict=True):
        # The logits are rounded to x's dtype; so are dlogits, and dhidden twice. In fp32: sums of
        # products in another order than the reference's.
        if a is not None:
            assert_close(a, b, factor=factor, dtype=x.dtype)
    return ours


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk_tokens", [4, 1000])
def test_matches_reference(path, device, dtype, reduction, chunk_tokens) -> None:
    x, weight, target = make(dtype=dtype, device=device)
    dloss = torch.randn(11, device=device) if reduction == "none" else None
    check(x, weight, target, dloss, reduction=reduction, chunk_tokens=chunk_tokens)


@both_ways
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mode", ["nanotron", "correct"])
def test_z_loss_and_ignored_tokens(path, device, mode, reduction, chunk_tokens) -> None:
    x, weight, target = make(device=device)
    target[::3] = -100
    _, z, dx, _ = check(
        x,
        weight,
        target,
        ignore_index=-100,
        reduction=reduction,
        z_loss=0.1,
        z_loss_mode=mode,
        chunk_tokens=chunk_tokens,
    )
    assert not z.requires_grad
    assert dx[::3].count_nonzero() == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_token_counts(path, device, reduction) -> None:
    """A mean over no tokens is 0, not NaN: one masked micro-batch must not end a training run."""
    for tokens in (0, 3):
        x, weight, target = make(tokens, device=device)
        out = run(
            linear_cross_entropy, x, weight, target.fill_(7), ignore_index=7, reduction=reduction
        )
        for tensor in (out[0], out[2], out[3]):
            assert tensor.count_nonzero() == 0
        assert out[3].shape == weight.shape


@both_ways
def test_only_what_is_needed_is_computed(path, device, chunk_tokens) -> None:
    x, weight, target = make(device=device)
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "chunk_tokens": chunk_tokens}
        both = run(linear_cross_entropy, x, weight, target, **options)
        for frozen, trained, expected in ((x, weight, both[3]), (weight, x, both[2])):
            frozen.requires_grad_(False)
            loss = linear_cross_entropy(x, weight, target, **options)
            (ours,) = torch.autograd.grad(loss, trained, torch.full_like(loss, 0.7))
            torch.testing.assert_close(ours, expected)
            frozen.requires_grad_(True)
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, target).requires_grad


@both_ways
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adds_to_a_main_gradient(path, device, dtype, reduction, chunk_tokens) -> None:
    """In fp32, whatever the weight's dtype; twice, as two micro-batches do."""
    x, weight, target = make(dtype=dtype, device=device)
    weight.main_grad = torch.ones(weight.shape, device=device)
    options = {"reduction": reduction, "chunk_tokens": chunk_tokens}
    for _ in range(2):
        (0.3 * linear_cross_entropy(x, weight, target, **options)).sum().backward()
    assert weight.grad is None
    weight64 = wide(weight, True)
    loss = linear_cross_entropy_reference(wide(x), weight64, target, reduction=reduction)
    (dweight,) = torch.autograd.grad(loss.sum(), weight64)
    # What is rounded to the dtype are the logits and their gradients: see `check`.
    assert_close(weight.main_grad - 1, 0.6 * dweight, factor=3, dtype=dtype)


@both_ways
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_backward_runs_twice(path, device, dtype, reduction, chunk_tokens) -> None:
    """To the same bits, though the first wrote over the logits; into a main gradient too."""
    x, weight, target = make(dtype=dtype, device=device)
    options = {"reduction": reduction, "chunk_tokens": chunk_tokens}
    loss = linear_cross_entropy(x, weight, target, **options).sum()
    first, *others = (
        torch.autograd.grad(factor * loss, (x, weight), retain_graph=True)
        for factor in (1.0, 1.0, 2.0)
    )
    for gradients, factor in zip(others, (1, 2), strict=True):
        for a, b in zip(first, gradients, strict=True):
            assert torch.equal(factor * a, b)
    weight.main_grad = torch.zeros(weight.shape, device=device)
    loss = linear_cross_entropy(x, weight, target, **options).sum()
    loss.backward(retain_graph=True)
    once = weight.main_grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.main_grad, 2 * once)


def test_saved_logits_may_be_kept_elsewhere(path, device) -> None:
    """As offloading to the CPU does it: every look at them gives a copy, without the padding."""
    x, weight, target = make(device=device)
    expected = run(linear_cross_entropy, x, weight, target)[2:]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        loss = linear_cross_entropy(x, weight, target)
        for _ in range(2):
            dloss = torch.tensor(0.7, device=device)
            found = torch.autograd.grad(loss, (x, weight), dloss, retain_graph=True)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)


def test_a_gradient_of_the_gradient_is_refused(path, device) -> None:
    x, weight, target = make(device=device)
    loss = linear_cross_entropy(x, weight, target)
    (dx,) = torch.autograd.grad(loss.square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no second derivative"):
        dx.sum().backward()


@both_ways
def test_a_small_factor_does_not_round_the_gradient_to_it(path, device, chunk_tokens) -> None:
    """1/3 in bf16 is off by 0.2%: the factor has to meet the gradient in fp32.

    A GPU rounds a tensor of no dimensions to the other's dtype first; the CPU does not.
    """
    x, weight, target = make(dtype=torch.bfloat16, device=device)
    loss = linear_cross_entropy(x, weight, target, reduction="sum", chunk_tokens=chunk_tokens)
    one = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    third = torch.autograd.grad(loss / 3, (x, weight))
    for whole, part in zip(one, third, strict=True):
        ratio = (part.float().norm() / whole.float().norm()).item()
        assert abs(ratio * 3 - 1) < 5e-4


def test_a_small_factor_does_not_make_gradients_of_logits_vanish_in_fp16(path, device) -> None:
    """They are rounded before the factor: 2^-16 of them alone would be 0 in fp16."""
    x, weight, target = make(dtype=torch.float16, device=device)
    weight.main_grad = torch.zeros(weight.shape, device=device)
    loss = linear_cross_entropy(x, weight, target, reduction="sum")
    (loss * 2**-16).backward()
    weight64 = wide(weight, True)
    loss64 = linear_cross_entropy_reference(wide(x), weight64, target, reduction="sum")
    (dweight,) = torch.autograd.grad(loss64 * 2**-16, weight64)
    assert_close(weight.main_grad, dweight, factor=3, dtype=torch.float16)


def test_inputs_that_are_not_contiguous(path, device) -> None:
    _, _, target = make(device=device)
    columns = torch.randn(24, 101, device=device).requires_grad_()
    half = torch.randn(24, 22, device=device).requires_grad_()
    loss = linear_cross_entropy(half.t()[::2], columns.t(), target, chunk_tokens=4)
    grads = torch.autograd.grad(loss, (half, columns))
    half64, columns64 = wide(half, True), wide(columns, True)
    loss64 = linear_cross_entropy_reference(half64.t()[::2], columns64.t(), target)
    for a, b in zip(grads, torch.autograd.grad(loss64, (half64, columns64)), strict=True):
        assert_close(a, b, factor=3)


@both_ways
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_weight_that_is_not_contiguous_has_its_main_gradient(
    path, device, reduction, chunk_tokens
) -> None:
    x, weight, target = make(device=device)
    turned = weight.detach().t().contiguous().t().requires_grad_()
    for each in (weight, turned):
        each.main_grad = torch.ones_like(each)
        linear_cross_entropy(
            x, each, target, reduction=reduction, chunk_tokens=chunk_tokens
        ).sum().backward()
    assert turned.grad is None
    assert_close(turned.main_grad - 1, weight.main_grad - 1, factor=2)


def test_gradcheck(torch_path) -> None:
    x, weight, target = make(5, 4, 7, torch.float64, torch_path)
    for reduction in REDUCTIONS:
        torch.autograd.gradcheck(
            lambda x, w, r=reduction: linear_cross_entropy(x, w, target, reduction=r), (x, weight)
        )


class _Logits(TorchDispatchMode):
    """The storages of all tensors with a column for every id of the vocabulary but weight^T."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.num_bytes: dict[int, int] = {}
        self.most_rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            is_tensor = isinstance(tensor, torch.Tensor)
            if is_tensor and tensor.shape[-1:] == self.weight.shape[:1]:
                if tensor.data_ptr() == self.weight.data_ptr():
                    continue
                storage = tensor.untyped_storage()
                self.num_bytes[storage.data_ptr()] = storage.nbytes()
                self.most_rows = max(self.most_rows, tensor.shape[0])
        return out


class _OfWeight(TorchDispatchMode):
    """Operations that give a tensor of the weight's shape, views of what was there left out."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.shape = weight.shape
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape == self.shape and not function.is_view:
            self.names.append(function.name().removeprefix("aten::"))
        return out


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("has_main_grad", [False, True])
def test_with_one_chunk_the_product_alone_touches_dweight(
    path, device, reduction, has_main_grad
) -> None:
    """No pass that clears, scales, casts or adds."""
    x, weight, target = make(64, 24, 96, device=device)
    if has_main_grad:
        weight.main_grad = torch.zeros(weight.shape, device=device)
    loss = linear_cross_entropy(x, weight, target, reduction=reduction).sum()
    with _OfWeight(weight) as found:
        torch.autograd.grad(loss, (x, weight), allow_unused=True)
    if not has_main_grad:  # what a product writes; on a GPU the tests fill it with NaN
        assert found.names.pop(0) == "empty_like"
        found.names = [name for name in found.names if name != "fill_.Scalar"]
    assert found.names == ["addmm_"]


def test_with_factors_of_tokens_the_products_alone_touch_a_main_gradient(path, device) -> None:
    x, weight, target = make(64, 24, 96, device=device)
    weight.main_grad = torch.zeros(weight.shape, device=device)
    loss = linear_cross_entropy(x, weight, target, reduction="none", chunk_tokens=32).sum()
    with _OfWeight(weight) as found:
        torch.autograd.grad(loss, (x, weight), allow_unused=True)
    assert found.names == ["addmm_", "addmm_"]


@pytest.mark.parametrize(("chunk_tokens", "bound"), [(4, 4), (0, 20)])
def test_the_logits_exist_once(path, device, chunk_tokens, bound) -> None:
    """One buffer of (chunk_tokens, vocab), which their gradient overwrites."""
    x, weight, target = make(20, 32, 192, torch.float16, device)
    x, weight = x.detach(), weight.detach()
    with _Logits(weight) as logits:
        _, _, maximum_and_sum, *_ = operators.forward_in_chunks(
            x, weight, target, "", 0, 1, None, 0.0, False, chunk_tokens, True, True
        )
    assert logits.most_rows == bound
    assert list(logits.num_bytes.values()) == [bound * 192 * 2]
    dloss = torch.ones(20, device=device)
    with _Logits(weight) as logits:
        operators.backward_in_chunks(
            x, weight, target, maximum_and_sum, dloss, "", 0, 1, None, 0.0, False, chunk_tokens,
            True, True,
        )  # fmt: skip
    assert logits.most_rows == bound
    # dlogits^T comes as a transposed view of the same buffer.
    assert list(logits.num_bytes.values()) == [bound * 192 * 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_a_gpu(triton_path) -> None:
    x, weight, target = make(4096, 256, 32000, torch.bfloat16, triton_path)
    linear_cross_entropy(x[:256], weight, target[:256]).backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(x, weight, target, chunk_tokens=512)
    peak = torch.cuda.max_memory_allocated() - before
    chunk, whole = 512 * 32000 * 2, 4096 * 32000 * 2
    # The allocator does not split off the last MiB of the blocks that the two largest are in.
    assert peak < chunk + weight.numel() * 4 + x.numel() * 2 + 3 * 2**20 < whole


def test_the_default_chunk() -> None:
    """All tokens whose logits take 1 GiB in bf16, and even parts of more."""
    for tokens, vocab in ((0, 10), (2, 1000), (5000, 1000), (4096, 131072)):
        assert operators.default_chunk_tokens(tokens, vocab) == tokens
        assert operators.is_one_chunk(tokens, vocab, 0) is (tokens > 0)
    for tokens, vocab, chunk in (
        (4097, 131072, 2176),
        (8192, 131072, 4096),
        (65536, 131072, 4096),
        (600_000, 1000, 300_032),
        (200, 2**23, 100),
    ):
        assert operators.default_chunk_tokens(tokens, vocab) == chunk
        assert not operators.is_one_chunk(tokens, vocab, 0)
    assert operators.is_one_chunk(8, 10, 8)
    assert not operators.is_one_chunk(9, 10, 8)


def test_logits_are_kept_where_chunks_would_not_take_less() -> None:
    """Those of a sum keep a gradient of the weight in fp32: 2 GiB at 4096 values and 131072 ids."""

    def keeps(tokens: int, reduction: str, is_trained: bool, chunk_tokens: int = 0) -> bool:
        hidden = torch.empty(tokens, 4096, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(131072, 4096, dtype=torch.bfloat16, device="meta")
        weight.requires_grad_(is_trained)
        return linear._keeps_logits(hidden, weight, reduction, chunk_tokens)

    assert keeps(8192, "mean", True)
    assert keeps(1, "sum", True)
    assert not keeps(0, "mean", True)
    assert not keeps(8193, "mean", True)
    assert not keeps(8192, "mean", True, 8191)
    assert keeps(9000, "mean", True, 9000)
    with torch.no_grad():  # nothing is kept
        assert not keeps(8192, "mean", True)
    for reduction, is_trained in (("none", True), ("mean", False)):
        assert keeps(4096, reduction, is_trained)
        assert not keeps(4097, reduction, is_trained)


@pytest.mark.parametrize(
    ("reduction", "chunk_tokens"), [("mean", 4), ("none", 4), ("mean", None), ("none", None)]
)
def test_what_is_saved(path, device, reduction, chunk_tokens) -> None:
    x, weight, target = make(dtype=torch.bfloat16, device=device)
    inputs = x.numel() * 2 + weight.numel() * 2 + 11 * 8  # and targets
    of_rows = 11 * 8  # M and s
    if chunk_tokens is None:
        bound = inputs + of_rows + 11 * 101 * 2  # and the logits
    elif reduction == "none":
        bound = inputs + of_rows
    else:  # dhidden in bf16 and dweight in fp32
        bound = x.numel() * 2 + weight.numel() * 4
    sizes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_cross_entropy(x, weight, target, reduction=reduction, chunk_tokens=chunk_tokens)
    # Outside of the op: the numbers that a mean divides by.
    assert 0 < sum(sizes) <= bound + 16


def test_operators_are_what_torch_expects(path, device) -> None:
    x, weight, target = make(6, 4, 9, device=device)
    x, weight = x.detach(), weight.detach()
    options = ("", 0, 1, 3, 0.1, True, 4)
    torch.library.opcheck(operators.forward.overload, (x, weight, target, *options, True, True))
    torch.library.opcheck(operators.forward.overload, (x, weight, target, *options, False, True))
    rows, dloss = torch.rand(2, 6, device=device), torch.rand(6, device=device)
    args = (x, weight, target, rows, dloss, *options, True, True)
    torch.library.opcheck(operators.backward.overload, args)


@both_ways
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(path, device, reduction, chunk_tokens) -> None:
    x, weight, target = make(device=device)

    def step(x, weight):
        loss, z = linear_cross_entropy(
            x * 1,
            weight,
            target,
            ignore_index=3,
            reduction=reduction,
            z_loss=0.1,
            chunk_tokens=chunk_tokens,
        )
        return loss, z

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(x, weight), step(x, weight), strict=True):
        torch.testing.assert_close(ours, expected)
    grads = torch.autograd.grad(compiled(x, weight)[0].sum(), (x, weight))
    expected = torch.autograd.grad(step(x, weight)[0].sum(), (x, weight))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_what_does_not_fit_is_named(device) -> None:
    x, weight, target = make(3, 8, 5, device=device)
    cases = [
        (r"weight \(5, 7\) torch.float32 for hidden \(3, 8\)", (x, weight[:, :7], target), {}),
        (r"weight \(5, 8\) torch.float16 for hidden", (x, weight.half(), target), {}),
        (r"weight \(5, 8\) torch.int64 for hidden", (x.long(), weight.long(), target), {}),
        (r"target \(2,\) for tokens \(3,\)", (x, weight, target[:2]), {}),
        (r"reduction='avg': choose none, mean, sum", (x, weight, target), {"reduction": "avg"}),
        (r"chunk_tokens=0 is below 1", (x, weight, target), {"chunk_tokens": 0}),
        (r"z_loss_mode='x'", (x, weight, target), {"z_loss_mode": "x"}),
    ]
    for message, args, options in cases:
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*args, **options)
