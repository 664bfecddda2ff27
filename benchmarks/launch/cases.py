"""Calls whose Python is timed, and beside each the least that a call with a gradient could cost.

The least is an autograd function around the same launches: it saves its inputs, allocates as many
results and as many tensors that launches write for others, launches what was recorded, with the
arguments that were recorded, and in backward does the same with the gradients. What an operation
does in torch beside its launches is in it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from benchmarks.launch.driver import Launch, recorded
from nanotron_fast.kernels.attention import attention
from nanotron_fast.kernels.cross_entropy import vocab_parallel_cross_entropy
from nanotron_fast.kernels.embedding import operators as embedding_operators
from nanotron_fast.kernels.embedding import vocab_parallel_embedding
from nanotron_fast.kernels.glu import glu
from nanotron_fast.kernels.optimizer import accumulate_, adamw_step_, clip_grad_norm_
from nanotron_fast.kernels.optimizer.grad_norm import get_total_norm
from nanotron_fast.kernels.optimizer.plan import NUM_PLANS
from nanotron_fast.kernels.rms_norm import rms_norm
from nanotron_fast.kernels.rope import rope_qkv, rope_tables
from nanotron_fast.kernels.rope.apart import rope_apart

BF16 = torch.bfloat16
NUM_TENSORS = 300


def _nothing(*tensors: Tensor) -> None:
    return None


@dataclass(frozen=True)
class Case:
    """An operation with a gradient.

    Args:
        tensors: its arguments.
        call: the operation.
        forward, backward: what it does in torch beside its launches, allocations left out.
    """

    name: str
    tensors: list[Tensor]
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    forward: Callable[..., object] = _nothing
    backward: Callable[..., object] = _nothing

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self.tensors if tensor.requires_grad]


def _leaf(*shape: int) -> Tensor:
    return torch.randn(shape).to(BF16).requires_grad_()


def _sum_of_partials(dy: Tensor, *rest: Tensor) -> None:
    torch.zeros(2, dy.shape[-1]).sum(0).to(BF16)


def _sort(ids: Tensor, weight: Tensor) -> None:
    """What the sum by id asks of torch: whose row an id is, and the order of the rows."""
    rows = ids.long() - 0
    is_here = (rows >= 0) & (rows < weight.shape[0])
    torch.sort(torch.where(is_here, rows, weight.shape[0]).int(), stable=True)
    torch.zeros_like(weight)


def operations() -> list[Case]:
    """Every operation that is one launch or a few, forward and backward."""
    torch.manual_seed(0)
    embedding_operators._check_ids = _nothing  # which looks at ids on a CPU alone
    cos, sin = rope_tables(64, 32)
    ids, target = torch.randint(96, (24,)), torch.randint(96, (24,))
    hidden, weight = _leaf(2, 12, 64), _leaf(64)
    table = _leaf(96, 64)
    return [
        Case("rms_norm", [hidden, weight], rms_norm, backward=_sum_of_partials),
        Case(
            "rms_norm with the residual",
            [hidden, weight, _leaf(2, 12, 64)],
            lambda x, weight, residual: rms_norm(x, weight, 1e-6, residual),
            backward=_sum_of_partials,
        ),
        Case("glu", [_leaf(2, 12, 128)], glu),
        Case(
            "rope_qkv",
            [_leaf(24, 8 * 64), cos, sin],
            lambda qkv, cos, sin: rope_qkv(qkv, cos, sin, 4, 2, 64),
        ),
        Case("rope_apart", [_leaf(24, 4, 64), _leaf(24, 2, 2, 64), cos, sin], rope_apart),
        Case("attention", [_leaf(1, 24, 4, 64), *(_leaf(1, 24, 2, 64) for _ in "kv")], attention),
        Case(
            "vocab_parallel_cross_entropy",
            [_leaf(24, 96), target],
            lambda logits, target: vocab_parallel_cross_entropy(logits, target, inplace=False),
        ),
        Case(
            "vocab_parallel_embedding",
            [ids, table],
            vocab_parallel_embedding,
            backward=lambda *_: _sort(ids, table),
        ),
    ]


class _Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bare: Bare, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.bare = bare
        bare.case.forward(*tensors)
        outputs = tuple([torch.empty(shape, dtype=dtype) for shape, dtype in bare.outputs])
        for shape, dtype in bare.scratch:
            torch.empty(shape, dtype=dtype)
        for launch in bare.launches:
            launch.again()
        return outputs if len(outputs) > 1 else outputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors, bare = ctx.saved_tensors, ctx.bare
        bare.case.backward(*gradients)
        needed = ctx.needs_input_grad[1:]
        made = [
            torch.empty_like(tensor) if is_needed else None
            for tensor, is_needed in zip(tensors, needed, strict=True)
        ]
        for shape, dtype in bare.scratch_backward:
            torch.empty(shape, dtype=dtype)
        for launch in bare.launches_backward:
            launch.again()
        return None, *made


def _storages(tensors: Iterable[Any]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors if isinstance(t, Tensor)}


def _scratch(launches: list[Launch], known: Iterable[Any]) -> list[tuple[torch.Size, torch.dtype]]:
    """Tensors of launches that are none of the known: one of them for each storage."""
    seen, found = _storages(known), []
    for launch in launches:
        for tensor in launch.arguments:
            if isinstance(tensor, Tensor) and not _storages([tensor]) <= seen:
                seen |= _storages([tensor])
                found.append((tensor.shape, tensor.dtype))
    return found


class Bare:
    """A case's launches in an autograd function, and nothing else."""

    def __init__(self, case: Case) -> None:
        self.case = case
        with recorded() as self.launches:
            out = case.call(*case.tensors)
        outputs = [out] if isinstance(out, Tensor) else [*out]
        self.outputs = [(output.shape, output.dtype) for output in outputs]
        given = [torch.ones_like(output) for output in outputs]
        with recorded() as self.launches_backward:
            gradients = torch.autograd.grad(outputs, case.leaves, given)
        known = [*case.tensors, *outputs]
        self.scratch = _scratch(self.launches, known)
        of_forward = [tensor for launch in self.launches for tensor in launch.arguments]
        known += [*given, *gradients, *of_forward]
        self.scratch_backward = _scratch(self.launches_backward, known)

    launches: list[Launch]
    launches_backward: list[Launch]

    def __call__(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        return _Bare.apply(self, *tensors)


def lists() -> dict[str, Callable[[], object]]:
    """Operations on lists of NUM_TENSORS tensors, as a training step calls them."""

    def made(dtype: torch.dtype) -> list[Tensor]:
        return [torch.zeros(64, dtype=dtype) for _ in range(NUM_TENSORS)]

    fp32 = torch.float32
    params, mains, averages, squares = (made(fp32) for _ in range(4))
    copies, grads, step = made(BF16), made(BF16), torch.zeros(())
    norm = {"lr": 1e-3, "copies": copies}

    # More lists than addresses are remembered of: each call meets tensors that are new to it.
    fresh = cycle([made(BF16) for _ in range(2 * NUM_PLANS)])

    return {
        "accumulate_": lambda: accumulate_(mains, grads),
        "get_total_norm": lambda: get_total_norm(mains),
        "clip_grad_norm_": lambda: clip_grad_norm_(mains, 1.0),
        "adamw_step_": lambda: adamw_step_(params, mains, averages, squares, step, **norm),
        "accumulate_ of new gradients": lambda: accumulate_(mains, next(fresh)),
    }
