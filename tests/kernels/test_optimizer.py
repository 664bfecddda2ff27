"""Accumulation and AdamW on lists, against fp64 and against torch."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from nanotron_fast.kernels.optimizer import (
    accumulate,
    accumulate_,
    adamw,
    adamw_step_,
    clip_grad_norm_,
    clip_grads_with_norm_,
    get_total_norm,
    grad_norm,
    multi_tensor,
)
from nanotron_fast.kernels.optimizer.adamw import adamw_step_reference_
from tests.kernels.checks import assert_close, wide
from tests.kernels.lists import assert_guards, make

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("offset", [0, 3])
def test_accumulate(path, device, offset) -> None:
    torch.manual_seed(0)
    mains, main_buffers = make([FP32], device, offset=offset)
    grads, _ = make([BF16, FP16, FP32], device, offset=offset)
    expected = [wide(main) + 0.3 * wide(grad) for main, grad in zip(mains, grads, strict=True)]
    kept = [grad.clone() for grad in grads]
    assert accumulate_(mains, grads, 0.3) is None
    for main, reference in zip(mains, expected, strict=True):
        assert_close(main, reference)
    assert all(torch.equal(*pair) for pair in zip(grads, kept, strict=True))
    assert_guards(main_buffers)


class AdamW:
    """Lists of one optimizer, to step on."""

    def __init__(self, device, param=FP32, grad=FP32, state=FP32, copy=None, *, shapes, offset=0):
        torch.manual_seed(1)
        self.params, guards = make([param], device, shapes, offset)
        self.exp_avgs, _ = make([state], device, shapes, offset)
        self.exp_avg_sqs, self.guards = make([state], device, shapes, offset)
        self.guards += guards
        torch._foreach_zero_(self.exp_avgs + self.exp_avg_sqs)
        self.steps = [torch.zeros((), device=device) for _ in shapes]
        self.copies = None if copy is None else make([copy], device, shapes, offset)[0]
        self.make_grads = partial(make, [grad], device, shapes, offset)

    def gradients(self, seed):
        torch.manual_seed(seed)
        return self.make_grads()[0]

    def step(self, grads, **options):
        lists = self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.steps
        adamw_step_(*lists, copies=self.copies, **options)

    def in_fp64(self):
        return [
            [wide(tensor) for tensor in tensors]
            for tensors in (self.params, self.exp_avgs, self.exp_avg_sqs)
        ]


OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("has_lr_tensor", [False, True])
def test_adamw_is_that_of_torch(path, device, has_lr_tensor, maximize) -> None:
    ours = AdamW(device, copy=BF16, shapes=[(3, 40), (2049,), (1,), (0,)], offset=3)
    theirs = [param.clone().requires_grad_() for param in ours.params]
    fused = torch.optim.AdamW(theirs, fused=True, maximize=maximize, **OPTIONS)
    for number in range(5):
        lr = OPTIONS["lr"] / (1 + number)
        fused.param_groups[0]["lr"] = lr
        grads = ours.gradients(number)
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.clone()
        fused.step()
        lr = torch.tensor(lr, device=device) if has_lr_tensor else lr
        ours.step(grads, **OPTIONS | {"lr": lr, "maximize": maximize})
    # Round-off of five steps, the same on both sides.
    close = partial(torch.testing.assert_close, rtol=2e-6, atol=2e-7)
    close(ours.params, [parameter.detach() for parameter in theirs])
    states = [fused.state[parameter] for parameter in theirs]
    close(ours.exp_avgs, [state["exp_avg"] for state in states])
    close(ours.exp_avg_sqs, [state["exp_avg_sq"] for state in states])
    assert [step.item() for step in ours.steps] == [5.0] * 4
    for copy, param in zip(ours.copies, ours.params, strict=True):
        assert_close(copy, wide(param))
    assert_guards(ours.guards)


@pytest.mark.parametrize(
    ("dtypes", "offset"),
    [
        ((FP32, BF16, FP32, BF16), 0),
        ((FP32, FP16, FP32, FP16), 5),
        ((BF16, BF16, FP32, None), 0),
        ((FP16, FP16, FP16, FP32), 0),
    ],
    ids=str,
)
def test_adamw_against_fp64(path, device, dtypes, offset) -> None:
    ours = AdamW(device, *dtypes, shapes=[(3, 40), (2049,), (7,)], offset=offset)
    params, exp_avgs, exp_avg_sqs = ours.in_fp64()
    # One counter for all of them, as a single number.
    ours.steps = torch.tensor(3.0, device=device)
    grads = ours.gradients(0)
    scale = torch.tensor([16.0], device=device)
    ours.step(grads, grad_scale=scale, found_inf=torch.zeros(1, device=device), **OPTIONS)
    adamw_step_reference_(
        params,
        [wide(grad) / 16 for grad in grads],
        exp_avgs,
        exp_avg_sqs,
        [torch.tensor(3.0, device=device)],
        **OPTIONS,
    )
    assert ours.steps.item() == 4.0
    for place in range(3):
        assert_close(ours.params[place], params[place])
        assert_close(ours.exp_avgs[place], exp_avgs[place])
        assert_close(ours.exp_avg_sqs[place], exp_avg_sqs[place])
        if ours.copies is not None:
            assert_close(ours.copies[place], params[place])
    assert_guards(ours.guards)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.95, 0.99999), (0.0, 0.5)], ids=str)
def test_bias_corrections_are_exact_from_the_first_step_on(path, device, betas) -> None:
    """Parameters of zero and a rate of one show the step itself; each counts for itself."""
    ours = AdamW(device, shapes=[(64,), (0,), (33,)])
    torch._foreach_zero_(ours.params)
    ours.steps[2].fill_(7.0)
    steps = [step.clone() for step in ours.steps]
    params, exp_avgs, exp_avg_sqs = ours.in_fp64()
    for number in range(3):
        grads = ours.gradients(number)
        options = {"lr": 1.0, "betas": betas, "eps": 1e-8, "weight_decay": 0.0}
        ours.step(grads, **options)
        adamw_step_reference_(
            params, [wide(grad) for grad in grads], exp_avgs, exp_avg_sqs, steps, **options
        )
        # Not the largest but each element: a wrong correction shows in all of them.
        for param, reference in zip(ours.params, params, strict=True):
            torch.testing.assert_close(param.double(), reference, rtol=3e-6, atol=3e-6)
    assert [step.item() for step in ours.steps] == [3.0, 3.0, 10.0]


def test_cpu_tensors_take_torchs_fused_step(monkeypatch) -> None:
    """All that it serves in one call; a mixture of dtypes, or a grad_scale, a call each."""
    calls = []
    fused = torch._fused_adamw_

    def counted(params, *args, **kwargs) -> None:
        calls.append([param.dtype for param in params])
        fused(params, *args, **kwargs)

    monkeypatch.setattr(torch, "_fused_adamw_", counted)
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "auto")
    cpu = torch.device("cpu")
    for dtypes, options, expected in (
        ((FP32, FP32, FP32, BF16), {}, [[FP32] * 3]),
        ((BF16, BF16, BF16, BF16), {}, [[BF16] * 3]),
        ((FP32, BF16, FP32, BF16), {}, [[FP32]] * 3),
        ((FP16, FP16, FP16, FP32), {}, [[FP32]] * 3),
        ((FP32, FP32, FP32, None), {"grad_scale": torch.tensor(2.0)}, [[FP32]] * 3),
    ):
        ours = AdamW(cpu, *dtypes, shapes=[(3, 40), (2049,), (7,)])
        grads = ours.gradients(0)
        kept = [grad.clone() for grad in grads]
        ours.step(grads, **OPTIONS, **options)
        assert calls == expected
        assert all(torch.equal(*pair) for pair in zip(grads, kept, strict=True))
        calls.clear()


def test_an_overflow_changes_nothing(path, device) -> None:
    ours = AdamW(device, grad=BF16, copy=BF16, shapes=[(3, 40), (2049,)])
    tensors = ours.params + ours.exp_avgs + ours.exp_avg_sqs + ours.copies + ours.steps
    kept = [tensor.clone() for tensor in tensors]
    grads = ours.gradients(0)
    grads[0][0, 0] = math.inf
    ours.step(grads, found_inf=torch.ones((), device=device), **OPTIONS)
    assert all(torch.equal(*pair) for pair in zip(tensors, kept, strict=True))


class _Sums(TorchDispatchMode):
    """Counts them."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten.sum.dim_IntList
        return function(*args, **(kwargs or {}))


def test_what_blocks_add_up_to_is_summed_once(path, device) -> None:
    """Each sum is a launch of its own."""
    with _Sums() as sums:
        norm = get_total_norm([torch.ones(size, device=device) for size in (9, 16)])
    assert norm == 5
    assert sums.number == 1


def test_a_norm_above_its_bound_as_grad_scale_is_clipping(path, device) -> None:
    clipped, scaled = (AdamW(device, shapes=[(3, 40), (77,)]) for _ in range(2))
    grads = clipped.gradients(0)
    norm = get_total_norm(grads)
    scaled.step(grads, grad_scale=((norm + 1e-6) / 0.5).clamp(min=1), **OPTIONS)
    clip_grads_with_norm_(grads, 0.5, norm)
    clipped.step(grads, **OPTIONS)
    torch.testing.assert_close(clipped.params, scaled.params)
    torch.testing.assert_close(clipped.exp_avg_sqs, scaled.exp_avg_sqs)


def test_parameters_that_require_gradients(path, device) -> None:
    ours = AdamW(device, shapes=[(8,)])
    (param,) = ours.params = [torch.ones(8, device=device, requires_grad=True)]
    version = param._version
    ours.step([torch.ones(8, device=device)], **OPTIONS)
    assert param.requires_grad
    assert param.is_leaf
    assert param.grad_fn is None
    # Autograd must see that a saved parameter has changed.
    assert param._version > version
    assert (param < 1).all()


def test_the_order_of_segments_is_made_once(triton_path) -> None:
    """The same sizes at other addresses: only addresses are new, and the result is right."""
    mains, _ = make([FP32], triton_path)
    grads, _ = make([BF16], triton_path)
    accumulate_(mains, grads)
    layouts = multi_tensor._layout.cache_info().misses
    moved = [grad.clone() for grad in grads]
    expected = [wide(main) + wide(grad) for main, grad in zip(mains, moved, strict=True)]
    accumulate_(mains, moved)
    assert multi_tensor._layout.cache_info().misses == layouts
    for main, reference in zip(mains, expected, strict=True):
        assert_close(main, reference)


def test_wide_accesses_where_every_list_allows_them(device) -> None:
    wide_buffer, half_buffer = torch.zeros(64, device=device), torch.zeros(64, device=device).half()

    def vectors(*lists):
        return [bundle.vector for bundle in multi_tensor.bundles_of([[t] for t in lists], 2048)]

    assert vectors(wide_buffer, half_buffer) == [4]
    assert vectors(half_buffer) == vectors(half_buffer, half_buffer[8:]) == [8]
    assert vectors(wide_buffer[4:], half_buffer[4:]) == [4]
    # An address that is off by an element, in one list or another; a size that is odd.
    assert vectors(wide_buffer[1:61], half_buffer[:60]) == [1]
    assert vectors(wide_buffer[:60], half_buffer[2:62]) == [1]
    assert vectors(half_buffer[4:]) == [1]
    assert vectors(wide_buffer[:62], half_buffer[:62]) == [1]


def test_other_tensors_at_an_old_address(triton_path) -> None:
    buffer = torch.zeros(4096, device=triton_path)
    for shape in ((100,), (3000,), (50,)):
        main = buffer[: shape[0]]
        buffer.zero_()
        accumulate_([main], [torch.ones(shape, device=triton_path)])
        assert buffer.sum().item() == shape[0]
    half = torch.ones(64, device=triton_path)
    for dtype in (BF16, FP16):
        main = torch.zeros(128, device=triton_path)
        half.view(dtype).fill_(0.5)
        accumulate_([main], [half.view(dtype)])
        assert (main == 0.5).all()


def test_offsets_past_two_to_the_31(triton_path) -> None:
    """A table that says the tensor began that far before the buffer which is there."""
    main = torch.zeros(2048, device=triton_path)
    grad = torch.ones(2048, device=triton_path).bfloat16()
    before = 2**32
    accumulate._accumulate_kernel[(1,)](
        torch.zeros(1, dtype=torch.int32, device=triton_path),
        torch.tensor([before + 2000, -before // 2048, 0], device=triton_path),
        torch.tensor([main.data_ptr() - 4 * before, grad.data_ptr() - 2 * before]).to(triton_path),
        1,
        1.0,
        GRAD=multi_tensor.TRITON_DTYPES[BF16],
        VECTOR=4,
        BLOCK=2048,
    )
    assert main.sum().item() == 2000
    assert main[2000:].sum().item() == 0


def test_empty_lists(path, device) -> None:
    accumulate_([], [])
    adamw_step_([], [], [], [], torch.zeros(()), lr=0.1)
    norm = clip_grad_norm_([], 1.0, device=device)
    assert norm.item() == 0
    assert norm.device.type == device.type
    nothing = [torch.zeros(0, 3, device=device)]
    accumulate_(nothing, nothing)
    for norm_type in (1.0, 2.0, 3.0, math.inf):
        assert clip_grad_norm_(nothing, 1.0, norm_type).item() == 0


def test_operators_are_what_torch_expects(triton_path) -> None:
    lists = [make(dtypes, triton_path, [(5,), (16,)])[0] for dtypes in ([FP32], [BF16]) * 3]
    mains, grads, params, copies, exp_avgs, _ = lists
    exp_avg_sqs = [tensor.square() for tensor in exp_avgs]
    norm = torch.tensor(3.0, device=triton_path)
    opcheck(accumulate._accumulate.overload, (mains, grads, 0.5))
    opcheck(grad_norm._power_sums.overload, (grads, 2.0))
    opcheck(grad_norm._clip.overload, (grads, 1.0, norm))
    steps = [torch.ones((), device=triton_path) for _ in range(2)]
    numbers = (1e-2, 0.9, 0.95, 1e-8, 0.1, False)
    state = params, grads, exp_avgs, exp_avg_sqs
    opcheck(adamw._adamw_step.overload, (*state, steps, copies, None, None, None, *numbers))
    tensors = [torch.ones((), device=triton_path) for _ in range(3)]
    opcheck(adamw._adamw_step.overload, (*state, steps[:1], [], *tensors, *numbers))


def test_compiles_without_a_graph_break(path, device) -> None:
    def train_step(state, grads, mains):
        accumulate_(mains, grads, 0.5)
        norm = clip_grad_norm_(mains, 1.0)
        state.step(mains, **OPTIONS)
        return norm

    results = []
    for function in (
        train_step,
        torch.compile(train_step, fullgraph=True, backend="aot_eager"),
    ):
        state = AdamW(device, copy=BF16, shapes=[(3, 40), (33,)])
        mains = state.gradients(1)
        norm = function(state, [grad.bfloat16() for grad in state.gradients(0)], mains)
        results.append([norm, *mains, *state.params, *state.exp_avgs, *state.copies, *state.steps])
    torch.testing.assert_close(*results)


def test_what_does_not_fit_is_named(device) -> None:
    a, b = torch.zeros(4, 8, device=device), torch.zeros(4, 8, device=device)
    with pytest.raises(ValueError, match="accumulate_: 1 grads for 2 mains"):
        accumulate_([a, b], [a])
    with pytest.raises(ValueError, match=r"grads\[1\] \(8, 4\) for mains\[1\] \(4, 8\)"):
        accumulate_([a, b], [b, a.t()])
    strided = torch.zeros(8, 4, device=device).t()
    with pytest.raises(ValueError, match=r"grads\[1\] \(4, 8\) has strides \(1, 4\)"):
        accumulate_([a, b], [b, strided])
    with pytest.raises(ValueError, match=r"mains\[0\] is torch.bfloat16, not torch.float32"):
        accumulate_([a.bfloat16()], [b])
    with pytest.raises(ValueError, match=r"grads\[0\] is torch.int64"):
        clip_grad_norm_([a.long()], 1.0)
    with pytest.raises(ValueError, match=r"grads\[0\] \(4, 8\) has strides"):
        clip_grads_with_norm_([strided], 1.0, torch.ones(()))
    with pytest.raises(ValueError, match=r"clip_grads_with_norm_: total_norm \(2,\)"):
        clip_grads_with_norm_([a], 1.0, torch.ones(2, device=device))
    for norm_type in (0.0, -1.0, -math.inf, math.nan):
        with pytest.raises(ValueError, match="choose p > 0, or inf"):
            get_total_norm([a], norm_type)
    step = torch.zeros((), device=device)
    with pytest.raises(ValueError, match="3 steps for 2 params"):
        adamw_step_([a, b], [a, b], [a, b], [a, b], [step] * 3, lr=0.1)
    with pytest.raises(ValueError, match=r"steps\[0\] \(\) torch.int64 on"):
        adamw_step_([a], [a], [a], [a], step.long(), lr=0.1)
    with pytest.raises(ValueError, match=r"exp_avg_sqs\[0\] is torch.float16 where params\[0\]"):
        adamw_step_([a], [a], [a], [a.half()], step, lr=0.1)
    with pytest.raises(ValueError, match=r"found_inf \(2,\) is not one number"):
        adamw_step_([a], [a], [a], [b], step, lr=0.1, found_inf=torch.zeros(2, device=device))
    for betas in ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, math.nan)):
        with pytest.raises(ValueError, match="each is from 0 to below 1"):
            adamw_step_([a], [a], [a], [b], step, lr=0.1, betas=betas)
    with pytest.raises(ValueError, match="1 copies for 2 params"):
        adamw_step_([a, b], [a, b], [a, b], [a, b], step, lr=0.1, copies=[a])
