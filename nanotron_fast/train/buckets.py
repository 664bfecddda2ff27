"""Sums of gradients over data-parallel ranks, started while backward goes on.

Parameters that are ready together are a bucket: those of a layer, and those behind the last layer.
A bucket is summed by one collective, or by two where some of its gradients have to be summed over
tensor-parallel ranks as well: those of all buckets lie together, in front. Those of experts that
other data-parallel ranks do not have are apart: they are summed over fewer ranks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from nanotron_fast.kernels.runtime.collectives import Group, resolve
from nanotron_fast.models.architecture import Block
from nanotron_fast.models.decoder import Decoder
from nanotron_fast.parallel.communication import Pending, start_all_reduce
from nanotron_fast.train.backward import when_left
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.parameters import Trained
from nanotron_fast.train.zero import start_sums_of_runs

# Addresses that wide accesses and reductions like.
_ALIGNMENT = 64
# Buckets under way: more of them would only hold more memory.
_NUM_UNDER_WAY = 4


@dataclass(slots=True)
class _Part:
    """Gradients of a bucket that are summed over the same ranks.

    Args:
        group: these ranks; None where there is no other.
        grads: of each parameter.
        slices: where they lie in the buffer, without gaps.
    """

    group: Group
    grads: list[Tensor] = field(default_factory=list)
    slices: list[Tensor] = field(default_factory=list)


@dataclass(slots=True)
class _Bucket:
    """Gradients that are ready at the same time.

    Args:
        block: the layer, "head" for what is behind the last layer, "embedding" for what is before
            the first.
        parts: its gradients, by the ranks that they are summed over.
        num_left: backward passes until they are complete; at 0 their sum is started.
    """

    block: Block
    parts: dict[bool, _Part] = field(default_factory=dict)
    num_left: int = 0


class Buckets:
    """The `main_grad` of all parameters of a rank in one buffer, and their sums.

    Args:
        trained: the parameters. Each is given its `main_grad`, zero.
        zero_stage: with 1 a rank gets the sums of its own runs alone.
    """

    def __init__(self, trained: Sequence[Trained], mesh: Mesh, *, zero_stage: int) -> None:
        self._mesh, self._zero_stage = mesh, zero_stage
        self._by_block: dict[Block, _Bucket] = {}
        self.started: set[Block] = set()
        self._under_way: deque[Callable[[], object]] = deque()
        for each in trained:
            block = _bucket_of(each)
            self._by_block.setdefault(block, _Bucket(block))
        places = {block: place for place, block in enumerate(self._by_block)}
        in_order = sorted(
            trained,
            key=lambda each: (
                not each.facts.sums_over_tp,
                places[_bucket_of(each)],
                each.is_of_experts,
            ),
        )
        sizes = [math.ceil(each.num_elements / _ALIGNMENT) * _ALIGNMENT for each in in_order]
        self.buffer = torch.zeros(sum(sizes), dtype=torch.float32, device=mesh.device)
        ends: dict[tuple[bool, Block, bool], list[int]] = {}
        at = 0
        for each, size in zip(in_order, sizes, strict=True):
            grad = self.buffer[at : at + each.num_elements].view_as(each.tensor)
            each.tensor.main_grad = grad
            block, is_of_experts = _bucket_of(each), each.is_of_experts
            parts = self._by_block[block].parts
            parts.setdefault(is_of_experts, _Part(each.replicas.group)).grads.append(grad)
            key = each.facts.sums_over_tp, block, is_of_experts
            ends.setdefault(key, [at, at])[1] = at + size
            at += size
        for (_, block, is_of_experts), (first, end) in ends.items():
            self._by_block[block].parts[is_of_experts].slices.append(self.buffer[first:end])
        over_tp = [end for (sums_over_tp, *_), (_, end) in ends.items() if sums_over_tp]
        self._over_tp = self.buffer[: max(over_tp, default=0)]

    def watch(self, decoder: Decoder) -> None:
        """Starts the sums of a decoder's layers as backward leaves them: see `begin`."""
        numbers = [block for block in decoder.blocks if isinstance(block, int)]
        for number, layer in zip(numbers, decoder.layers, strict=True):
            ready: list[Block] = [number]
            if number == numbers[-1] and "head" in decoder.blocks:
                ready.insert(0, "head")
            buckets = [self._by_block[block] for block in ready if block in self._by_block]
            if buckets:
                when_left(layer, partial(self._passed, buckets))

    def begin(self, num_micro_batches: int) -> None:
        """Before a step: backward will pass through every layer so many times.

        Without it the sums are all taken by `reduce`.
        """
        self._wait_for_all_but(0)
        self.started.clear()
        for bucket in self._by_block.values():
            bucket.num_left = num_micro_batches

    @torch.no_grad()
    def reduce(self) -> None:
        """Sums over data-parallel ranks what is not summed yet, then over tensor-parallel ranks.

        The order of both makes no difference, and the first can begin within backward.
        """
        for bucket in self._by_block.values():
            if bucket.block not in self.started:
                self._start(bucket)
        self._wait_for_all_but(0)
        self.started.clear()
        if len(self._over_tp):
            start_all_reduce(self._over_tp, resolve(self._mesh.tp_group)).wait()

    def _passed(self, buckets: Iterable[_Bucket]) -> None:
        for bucket in buckets:
            bucket.num_left -= 1
            if bucket.num_left == 0:
                self._start(bucket)

    @torch.no_grad()
    def _start(self, bucket: _Bucket) -> None:
        self.started.add(bucket.block)
        for part in bucket.parts.values():
            if part.group is None:
                continue
            self._wait_for_all_but(_NUM_UNDER_WAY - 1)
            if self._zero_stage > 0:
                self._under_way.append(start_sums_of_runs(part.grads, part.group))
                continue
            ranks = resolve(part.group)
            pending = [start_all_reduce(each, ranks) for each in part.slices]
            self._under_way.append(partial(_finish, pending))

    def _wait_for_all_but(self, number: int) -> None:
        while len(self._under_way) > number:
            self._under_way.popleft()()


def _finish(pending: Iterable[Pending]) -> None:
    for each in pending:
        each.wait()


def _bucket_of(trained: Trained) -> Block:
    """The final norm goes with the head."""
    block = trained.facts.param.block
    return "head" if block == "norm" else block
