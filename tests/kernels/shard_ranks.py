"""A rank of test_shards.py: lists of DTensors against the same on whole tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from nanotron_fast.kernels.optimizer import (
    accumulate_,
    adamw_step_,
    clip_grad_norm_,
    clip_grads_with_norm_,
    get_total_norm,
)
from nanotron_fast.kernels.optimizer.adamw_torch import adamw_step_reference_
from tests.kernels.checks import RUNS_ON_CPU, assert_close
from tests.parallel.ranks import join, run_cases

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
# Rows that split unevenly, one that a rank has nothing of, one that all have, a plain tensor.
SHAPES = ((5, 4), (1, 3), (7,), (2, 2))
KINDS = ("shard", "shard", "replicate", "plain")


def whole(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def placed(tensor: Tensor, mesh, placements) -> Tensor:
    """Of memory of its own, which a replicated DTensor would share with what it is made of."""
    return distribute_tensor(tensor.clone(), mesh, placements)


def laid_out(tensors: list[Tensor], mesh) -> list[Tensor]:
    """As they lie on a mesh of (1, 2), where dimension 0 has no part in it."""
    placements = {"shard": [Replicate(), Shard(0)], "replicate": [Replicate(), Replicate()]}
    return [
        tensor.clone() if kind == "plain" else placed(tensor, mesh, placements[kind])
        for tensor, kind in zip(tensors, KINDS, strict=True)
    ]


def check(ours: list[Tensor], expected: list[Tensor]) -> None:
    for tensor, reference in zip(ours, expected, strict=True):
        found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert_close(found.detach(), reference)


def adamw(mesh) -> None:
    states = [whole(0), whole(1), [t.square() for t in whole(2)]]
    params, exp_avgs, exp_avg_sqs = (laid_out(tensors, mesh) for tensors in states)
    params = [torch.nn.Parameter(param) for param in params]
    copies = laid_out([t.bfloat16() for t in whole(3)], mesh)
    steps = [torch.zeros(()) for _ in range(2)]
    versions = [param._version for param in params]
    for seed in (4, 5):
        grads = whole(seed)
        lists = (params, laid_out(grads, mesh), exp_avgs, exp_avg_sqs)
        adamw_step_(*lists, steps[0], copies=copies, **OPTIONS)
        adamw_step_reference_(states[0], grads, *states[1:], steps[1:], **OPTIONS)
    for ours, expected in zip(
        (params, exp_avgs, exp_avg_sqs, copies), (*states, states[0]), strict=True
    ):
        check(ours, expected)
    assert steps[0] == 2
    assert all(param._version > version for param, version in zip(params, versions, strict=True))


def clip(norm_type: float, mesh) -> None:
    grads = whole(0)
    flat = torch.cat([grad.flatten() for grad in grads])
    norm = torch.linalg.vector_norm(flat, norm_type)
    ours = laid_out(grads, mesh)
    assert_close(clip_grad_norm_(ours, 1.0, norm_type), norm)
    check(ours, [grad / (norm + 1e-6) for grad in grads])


def clip_to_the_norm_of_torch(mesh) -> None:
    grads = whole(0)[:2]
    ours = laid_out(whole(0), mesh)[:2]
    norm = torch.nn.utils.get_total_norm(ours)
    assert isinstance(norm, DTensor)
    clip_grads_with_norm_(ours, 1.0, norm)
    expected = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in grads]))
    check(ours, [grad / (expected + 1e-6) for grad in grads])


def adamw_by_the_norm_of_torch(mesh) -> None:
    """Whose gradients are clipped within the step."""
    grads = whole(0)[:2]
    params, ours, exp_avgs, exp_avg_sqs = (laid_out(whole(0), mesh)[:2] for _ in range(4))
    for tensor in (*exp_avgs, *exp_avg_sqs):
        tensor.zero_()
    grad_scale = (torch.nn.utils.get_total_norm(ours) + 1e-6).clamp(min=1)
    assert isinstance(grad_scale, DTensor)
    adamw_step_(
        *(params, ours, exp_avgs, exp_avg_sqs, torch.zeros(())), grad_scale=grad_scale, **OPTIONS
    )
    norm = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in grads]))
    check(exp_avgs, [0.1 * grad / (norm + 1e-6) for grad in grads])


def accumulate(mesh) -> None:
    mains, grads = whole(0), whole(1)
    ours = laid_out(mains, mesh)
    accumulate_(ours, laid_out(grads, mesh), 0.5)
    check(ours, [main + 0.5 * grad for main, grad in zip(mains, grads, strict=True)])


def refusals(mesh) -> None:
    param, *_ = laid_out(whole(0), mesh)
    kept, step = param.full_tensor(), torch.zeros(())
    other = distribute_tensor(whole(1)[0], mesh, [Replicate(), Shard(1)])
    with pytest.raises(ValueError, match=r"grads\[0\] has placements .* where params\[0\] has"):
        adamw_step_([param], [other], [param], [param], step, lr=0.1)
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] is a plain tensor where params\[0\] has"):
        adamw_step_([param], [param], [param.to_local()], [param], step, lr=0.1)
    unsummed = DTensor.from_local(torch.ones(4), mesh, [Replicate(), Partial()])
    with pytest.raises(ValueError, match=r"grads\[0\] has placements .*: it is yet to be summed"):
        get_total_norm([unsummed])
    for call in (
        lambda: adamw_step_([kept], [param], [kept], [kept], step, lr=0.1),
        lambda: adamw_step_([kept], [kept], [kept], [kept], step, lr=0.1, copies=[param]),
        lambda: accumulate_([kept], [param]),
    ):
        with pytest.raises(ValueError, match=r"\[0\] is a DTensor where \w+\[0\] is a plain"):
            call()
    with pytest.raises(ValueError, match="accumulate_: 0 grads for 1 mains"):
        accumulate_([param], [])
    assert torch.equal(param.full_tensor(), kept)
    assert torch.equal(kept, whole(0)[0])
    assert step == 0


class Own(DTensor):
    """A class of somebody's own."""


def of_a_class_of_its_own(mesh) -> None:
    grad = whole(0)[0]
    tensor = placed(grad, mesh, [Replicate(), Shard(0)])
    tensor.__class__ = Own
    norm = get_total_norm([tensor])
    assert not isinstance(norm, DTensor)
    assert_close(norm, torch.linalg.vector_norm(grad))


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    mesh = dist.init_device_mesh("cpu", (1, 2))
    for path in ("torch", "triton") if RUNS_ON_CPU else ("torch",):
        os.environ["NANOTRON_FAST_BACKEND"] = path
        yield f"{path}, adamw", partial(adamw, mesh)
        for norm_type in (2.0, 3.0, math.inf):
            yield f"{path}, clip to {norm_type}", partial(clip, norm_type, mesh)
        yield f"{path}, torch's norm", partial(clip_to_the_norm_of_torch, mesh)
        yield f"{path}, a step by torch's norm", partial(adamw_by_the_norm_of_torch, mesh)
        yield f"{path}, accumulate", partial(accumulate, mesh)
        yield f"{path}, refusals", partial(refusals, mesh)
        yield f"{path}, a class of its own", partial(of_a_class_of_its_own, mesh)


if __name__ == "__main__":
    join()
    run_cases(cases())
