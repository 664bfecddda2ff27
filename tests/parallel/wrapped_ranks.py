"""A rank of test_wrapped.py: our operations in a model of a user's own, in torch's wrappers.

Two ranks take three steps on their own batches. Losses, gradients and weights are held to the same
model in plain torch, which one process trains on both batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nanotron_fast.kernels.attention import attention
from nanotron_fast.kernels.embedding import vocab_parallel_embedding
from nanotron_fast.kernels.linear_cross_entropy import linear_cross_entropy
from nanotron_fast.kernels.optimizer import adamw_step_, clip_grad_norm_
from nanotron_fast.kernels.rms_norm import rms_norm
from nanotron_fast.kernels.rope import rope_qkv, rope_qkv_reference, rope_tables
from nanotron_fast.parallel import tensor_parallel_mlp
from tests.parallel.ranks import check, join, run_cases

VOCAB, HIDDEN, INTER, LENGTH = 33, 16, 20, 6
HEADS = (2, 1, 8)
MAX_NORM, LR = 0.5, 1e-2


def matrix(rows: int, cols: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, cols) / cols**0.5)


class Block(nn.Module):
    def __init__(self, is_ours: bool) -> None:
        super().__init__()
        self.is_ours = is_ours
        self.norms = nn.Parameter(torch.rand(2, HIDDEN) + 0.5)
        self.qkv, self.out = matrix(32, HIDDEN), matrix(HIDDEN, 16)
        self.gate_up, self.down = matrix(2 * INTER, HIDDEN), matrix(HIDDEN, INTER)
        self.tables = rope_tables(8, LENGTH)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(LENGTH).repeat(len(x) // LENGTH)
        attend, turn = attention, rope_qkv
        if not self.is_ours:
            attend, turn = partial(attention, backend="torch"), rope_qkv_reference
        packed = F.linear(self.norm(x, 0), self.qkv)
        heads = turn(packed, *self.tables, *HEADS, positions)
        q, k, v = (each.unflatten(0, (-1, LENGTH)) for each in heads)
        attended = F.linear(attend(q, k, v).reshape(len(x), 16), self.out)
        if self.is_ours:
            y, x = rms_norm(attended, self.norms[1], residual=x)
            return x + tensor_parallel_mlp(y, self.gate_up, self.down)
        x = x + attended
        gate, up = F.linear(self.norm(x, 1), self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)

    def norm(self, x: Tensor, place: int) -> Tensor:
        weight = self.norms[place]
        return rms_norm(x, weight) if self.is_ours else F.rms_norm(x, (HIDDEN,), weight, 1e-6)


class Model(nn.Module):
    def __init__(self, is_ours: bool, checkpoints: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.is_ours, self.checkpoints = is_ours, checkpoints
        self.table, self.head = matrix(VOCAB, HIDDEN), matrix(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(Block(is_ours) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        """The mean loss of the next of the ids (batch, length + 1)."""
        given, target = ids[:, :-1].flatten(), ids[:, 1:].flatten()
        embed = vocab_parallel_embedding if self.is_ours else F.embedding
        x = embed(given, self.table)
        for block in self.blocks:
            if self.checkpoints is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpoints)
        if self.is_ours:
            return linear_cross_entropy(x, self.head, target)
        return F.cross_entropy(F.linear(x, self.head), target)


def batch(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(2 * step + rank)
    return torch.randint(VOCAB, (2, LENGTH + 1), generator=generator)


def sharded(model: Model, **options) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


class AdamW:
    """A loop of a user's own around our clipping and our step."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters, self.steps = parameters, torch.zeros(())
        self.states = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]

    def step(self) -> None:
        grads = [parameter.grad for parameter in self.parameters]
        clip_grad_norm_(grads, MAX_NORM)
        adamw_step_(self.parameters, grads, *self.states, self.steps, lr=LR)


def train(
    wrap: Callable[[Model], nn.Module],
    *,
    checkpoints: bool | None = None,
    autocast: bool = False,
    tolerance: float = 1e-5,
    empty_rank: int | None = None,
) -> None:
    plain, ours = Model(False), wrap(Model(True, checkpoints))
    theirs = torch.optim.AdamW(plain.parameters(), lr=LR)
    optimizer = AdamW(list(ours.parameters()))
    for step in range(3):
        plain.zero_grad()
        for parameter in ours.parameters():
            parameter.grad = None
        batches = [batch(step, rank) for rank in range(2)]
        if empty_rank is not None:
            batches[empty_rank] = batches[empty_rank][:0]
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = ours(batches[dist.get_rank()])
        loss.backward()
        losses = [plain(ids) for ids in batches if len(ids)]
        (sum(losses) / 2).backward()
        if len(losses) == 2:
            check(loss.detach(), losses[dist.get_rank()].detach(), "loss", tolerance)
        for (name, found), expected in zip(
            ours.named_parameters(), plain.parameters(), strict=True
        ):
            check(whole(found.grad), expected.grad, f"gradient of {name}", 10 * tolerance)
        nn.utils.clip_grad_norm_(plain.parameters(), MAX_NORM)
        theirs.step()
        optimizer.step()
    if tolerance < 1e-3:  # the first steps of AdamW are of one size, whatever the gradient's
        for found, expected in zip(ours.parameters(), plain.parameters(), strict=True):
            check(whole(found), expected.detach(), "a weight", 1e-3)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    low = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
    yield "DDP", partial(train, DistributedDataParallel)
    yield "DDP, a rank without rows", partial(train, DistributedDataParallel, empty_rank=1)
    yield "DDP, autocast", partial(train, DistributedDataParallel, autocast=True, tolerance=0.02)
    yield "FSDP2", partial(train, sharded)
    yield "FSDP2, a rank without rows", partial(train, sharded, empty_rank=0)
    yield "FSDP2, bf16", partial(train, partial(sharded, **low), tolerance=0.02)
    for reentrant in (False, True):
        yield f"FSDP2, checkpoints {reentrant}", partial(train, sharded, checkpoints=reentrant)


if __name__ == "__main__":
    join()
    run_cases(cases())
