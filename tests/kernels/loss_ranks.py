"""What each RANK of test_loss_parallel runs: python -m tests.kernels.loss_ranks folder.

Four processes on gloo run every case once, over all four and then two of them over a group of two.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from nanotron_fast.kernels.cross_entropy import vocab_parallel_cross_entropy
from nanotron_fast.kernels.embedding import vocab_parallel_embedding
from nanotron_fast.kernels.linear_cross_entropy import linear_cross_entropy
from nanotron_fast.kernels.runtime.collectives import Group, resolve
from tests.interpreter import patch_once_a_launch
from tests.kernels.checks import RUNS_ON_CPU, assert_close

NUM_RANKS = 4
TOKENS, HIDDEN, VOCAB = 8, 12, 40


def shard(tensor: Tensor, group: Group, dim: int) -> Tensor:
    return tensor.chunk(resolve(group).size, dim)[resolve(group).rank]


def random(*shape: int, seed: int = 0) -> Tensor:
    """The same on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def targets() -> Tensor:
    """Ids of every rank, the first and the last, one of padding, one outside the vocabulary."""
    return torch.tensor([0, 9, 10, 25, 39, -100, 31, 40])


class Collectives(TorchDispatchMode):
    """Names of the collectives that are called. (torch's CommDebugMode takes 1.5 s to import.)"""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition("::")[2]
        if function.namespace in ("_c10d_functional", "c10d") and name != "wait_tensor":
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def cross_entropy(group: Group, scale: float, **options) -> None:
    logits, dloss = random(TOKENS, VOCAB) * scale, random(TOKENS, seed=1)

    def step(values: Tensor, group: Group) -> tuple[Tensor, ...]:
        leaf = values.clone().requires_grad_()
        out = vocab_parallel_cross_entropy(leaf * 1, targets(), group, **options)
        outs = out if isinstance(out, tuple) else (out,)
        return *(t.detach() for t in outs), torch.autograd.grad(outs[0], leaf, dloss)[0]

    with Collectives() as collectives:
        ours = step(shard(logits, group, 1), group)
    whole = step(logits, None)
    for a, b in zip(ours[:-1], whole[:-1], strict=True):
        assert_close(a, b)
    assert_close(ours[-1], shard(whole[-1], group, 1))
    assert collectives.names == ["all_gather_into_tensor"]


def a_rank_without_logits(group: Group) -> None:
    """Where the vocabulary is padded by a whole rank, its logits are -inf."""
    logits = random(TOKENS, VOCAB)
    logits[:, : VOCAB // resolve(group).size] = float("-inf")
    target = torch.full((TOKENS,), VOCAB - 1)
    leaf = shard(logits, group, 1).clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(leaf, target, group)
    (dlogits,) = torch.autograd.grad(loss.sum(), leaf)
    whole = logits.clone().requires_grad_()
    loss_of_all = vocab_parallel_cross_entropy(whole, target)
    assert_close(loss.detach(), loss_of_all.detach())
    assert_close(dlogits, shard(torch.autograd.grad(loss_of_all.sum(), whole)[0], group, 1))


def linear(group: Group, chunk_tokens: int | None = 3, **options) -> None:
    # Columns beside each other; but the gradient in rows, for NCCL sums nothing else.
    hidden, weight = random(HIDDEN, TOKENS).t(), random(VOCAB, HIDDEN, seed=1)

    def step(weight: Tensor, group: Group) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        out = linear_cross_entropy(*leaves, targets(), group, chunk_tokens=chunk_tokens, **options)
        outs = out if isinstance(out, tuple) else (out,)
        dloss = random(TOKENS, seed=2) if outs[0].dim() else torch.tensor(0.3)
        return *(t.detach() for t in outs), *torch.autograd.grad(outs[0], leaves, dloss)

    ours, whole = step(shard(weight, group, 0), group), step(weight, None)
    *losses, dhidden, dweight = ours
    *losses_of_all, dhidden_of_all, dweight_of_all = whole
    for a, b in zip(losses, losses_of_all, strict=True):
        assert_close(a, b)
    assert dhidden.is_contiguous()
    # Summed in another order: over ranks, and in products of other sizes.
    assert_close(dhidden, dhidden_of_all, factor=2)
    assert_close(dweight, shard(dweight_of_all, group, 0), factor=2)


def embedding(group: Group, mode: str, dtype: torch.dtype, padding_idx: int | None) -> None:
    # int8 holds these ids, but not those of a larger vocabulary less a rank's first row.
    ids = torch.tensor([[0, 9, 10], [25, 39, 39], [0, 31, 20], [30, 29, 19]], dtype=torch.int8)
    weight, dy = random(VOCAB, HIDDEN).to(dtype), random(4, 3, HIDDEN, seed=1).to(dtype)

    def step(weight: Tensor, group: Group, dy: Tensor) -> tuple[Tensor, Tensor]:
        leaf = weight.clone().requires_grad_()
        out = vocab_parallel_embedding(ids, leaf, group, mode=mode, padding_idx=padding_idx)
        return out.detach(), torch.autograd.grad(out, leaf, dy)[0]

    is_scattered = mode == "reduce_scatter"
    out, dweight = step(shard(weight, group, 0), group, shard(dy, group, 0) if is_scattered else dy)
    out_of_all, dweight_of_all = step(weight, None, dy)
    # All but one rank add zeros: nothing is rounded.
    assert torch.equal(out, shard(out_of_all, group, 0) if is_scattered else out_of_all)
    assert_close(dweight, shard(dweight_of_all, group, 0))


def compiled(group: Group) -> None:
    """One graph from ids to loss, with the collectives of all three operations in it."""
    ids = torch.tensor([0, 9, 10, 25, 39, 5, 31, 12])
    weight = random(VOCAB, HIDDEN)

    def step(weight: Tensor, group: Group) -> Tensor:
        hidden = vocab_parallel_embedding(ids, weight, group)
        scattered = vocab_parallel_embedding(ids, weight, group, mode="reduce_scatter")
        losses = vocab_parallel_cross_entropy(hidden @ weight.t(), targets(), group)
        linear = linear_cross_entropy(hidden.detach(), weight, targets(), group)
        return losses.sum() + linear + scattered.sum() * 0.1

    outs = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = shard(weight, group, 0).clone().requires_grad_()
        loss = function(leaf, group)
        outs.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    for ours, expected in zip(outs[1], outs[0], strict=True):
        assert_close(ours, expected)


def misfits(group: Group) -> None:
    with pytest.raises(ValueError, match=r"ids \(5,\) do not split along dim 0 over"):
        vocab_parallel_embedding(
            torch.zeros(5, dtype=torch.int64), random(10, 4), group, mode="reduce_scatter"
        )
    with pytest.raises(IndexError, match=f"id 99 for a vocabulary of {10 * resolve(group).size}"):
        vocab_parallel_embedding(torch.tensor([0, 99]), random(10, 4), group)


def mesh_of_two_dimensions(group: Group) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match="a mesh of one dimension, not 2"):
        resolve(mesh)
    assert resolve(mesh["tp"]).size == 2
    assert resolve(mesh["tp"]).rank == dist.get_rank() % 2
    cross_entropy(mesh["tp"], 3.0)


Z_LOSS = {"z_loss": 0.1, "ignore_index": -100}
CASES: dict[str, Callable[[Group], None]] = {
    "cross entropy": partial(cross_entropy, scale=3.0),
    "cross entropy, large": partial(cross_entropy, scale=1e4),
    "cross entropy, z-loss": partial(cross_entropy, scale=3.0, **Z_LOSS),
    "cross entropy, correct z-loss": partial(
        cross_entropy, scale=3.0, z_loss_mode="correct", **Z_LOSS
    ),
    "a rank without logits": a_rank_without_logits,
    "linear, mean": partial(linear, ignore_index=-100),
    "linear, sum": partial(linear, reduction="sum", z_loss_mode="correct", **Z_LOSS),
    "linear, none": partial(linear, reduction="none", z_loss=0.1),
    "linear, one chunk": partial(linear, chunk_tokens=None, **Z_LOSS),
    "linear, none, one chunk": partial(linear, chunk_tokens=None, reduction="none"),
    "embedding": partial(embedding, mode="all_reduce", dtype=torch.bfloat16, padding_idx=None),
    "embedding, scattered": partial(
        embedding, mode="reduce_scatter", dtype=torch.float32, padding_idx=39
    ),
    "misfits": misfits,
}
PATHS = ("torch", "triton")
# name of a run -> path, size of the group, case
RUNS = {f"{p}, {n} ranks: {case}": (p, n, case) for p, n, case in product(PATHS, (2, 4), CASES)}
RUNS |= {"torch, 2 ranks: compiled": ("torch", 2, "compiled")}
RUNS |= {"torch, 4 ranks: mesh": ("torch", 4, "mesh")}
ONCE = {"compiled": compiled, "mesh": mesh_of_two_dimensions}


def run_rank(folder: Path, rank: int) -> None:
    """What one process does: every run, and a file of those that failed."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=NUM_RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    # Not the first two, so that a rank in the group is not its rank in the world.
    groups = {2: dist.new_group([1, 3]), 4: dist.group.WORLD}
    failures = {}
    for name, (path, size, case) in RUNS.items():
        is_member = size == NUM_RANKS or rank in (1, 3)
        if not is_member or (path == "triton" and not RUNS_ON_CPU):
            continue
        os.environ["NANOTRON_FAST_BACKEND"] = path
        try:
            (CASES | ONCE)[case](groups[size])
        except Exception:
            failures[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(failures))
    dist.barrier()
    # Not through the interpreter's own end: gloo's threads may outlive their group, and abort it.
    os._exit(0)


if __name__ == "__main__":
    patch_once_a_launch()
    run_rank(Path(sys.argv[1]), int(os.environ["RANK"]))
