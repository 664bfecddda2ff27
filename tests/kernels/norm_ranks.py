"""A rank of test_grad_norm.py: the norm of gradients that lie on two ranks, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist

from nanotron_fast.kernels.optimizer import clip_grad_norm_
from nanotron_fast.kernels.runtime.collectives import Group
from tests.parallel.ranks import join, run_cases


def clip(norm_type: float, group: Group, lists: list[list[torch.Tensor]], whole: torch.Tensor):
    """`lists` are the gradients of each rank, and together those of `whole`."""
    mine = lists[dist.get_rank()]
    grads = [grad.clone() for grad in mine]
    norm = clip_grad_norm_(grads, 1.0, norm_type, group, device="cpu")
    expected = torch.linalg.vector_norm(whole, norm_type)
    torch.testing.assert_close(norm, expected)
    for grad, full in zip(grads, mine, strict=True):
        torch.testing.assert_close(grad, full / (expected + 1e-6))


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    whole = torch.arange(1.0, 101.0)
    mesh = dist.init_device_mesh("cpu", (2,))
    for norm_type in (2.0, 3.0, math.inf):
        halves = [[whole[:30]], [whole[30:]]]
        yield f"{norm_type}", partial(clip, norm_type, dist.group.WORLD, halves, whole)
        one_empty = [[whole], []]
        yield (
            f"{norm_type}, a mesh, a rank without",
            partial(clip, norm_type, mesh, one_empty, whole),
        )


if __name__ == "__main__":
    join()
    run_cases(cases())
