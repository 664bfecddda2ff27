"""What an operation found out about lists of tensors when it met them first.

A training step goes over the same tensors every time. To check hundreds of them and to look up
their tables takes milliseconds of Python; to see that they are the same tensors at the same
addresses takes a tenth of one. A `Plan` is what was found: that the lists fit, the tables of the
launches, whether autograd has to be told.

A plan holds no tensor alive. It is forgotten when one of its tensors is gone, so that an object of
the same identity is the same tensor. Such a tensor may have been given other memory, by `data` or
`set_`, and then has another address: it is looked at anew. One whose strides alone were changed in
place, as `t_` does, is not noticed.

A CUDA graph that captures a launch reads the plan's tables in every replay: such a plan is kept for
good. A capture makes no tables, see `multi_tensor`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from nanotron_fast.kernels.optimizer import multi_tensor
from nanotron_fast.kernels.optimizer.multi_tensor import TRITON_DTYPES, Bundle
from nanotron_fast.kernels.runtime import capture
from nanotron_fast.kernels.runtime.backend import uses_triton
from nanotron_fast.kernels.runtime.operators import (
    OWN_DISPATCH,
    is_watched,
    survey,
    tell_autograd,
)

# Plans that are remembered: a training step uses three or four for each group of parameters.
_NUM_REMEMBERED = 64
_Key = tuple[str, int, tuple[int, ...], int]


@dataclass(eq=False)
class Plan:
    """Lists of tensors as the launches of an operation take them.

    Args:
        identities, addresses: of all tensors, one list after the other.
        is_served: whether a launch may take them: plain tensors of dtypes that kernels know. If
            not, there are no tables.
        bundles: what each launch takes.
        singles: addresses of the tensors beside the lists, (tensors,) int64 on the device; None
            where there are none.
        device_index: of the GPU; -1 for a CPU.
        has_inference: whether one of them was made in inference mode, and has no version.
        is_captured: whether a graph reads the tables.
        watchers: what forgets the plan when a tensor is gone.
    """

    identities: list[int]
    addresses: list[int]
    is_served: bool
    bundles: tuple[Bundle, ...]
    singles: Tensor | None
    device_index: int
    has_inference: bool
    is_captured: bool = False
    watchers: list[weakref.ref[Tensor]] = field(default_factory=list)

    def tell_autograd(self, *written: list[Tensor]) -> None:
        """Raises the versions of these of its lists."""
        for tensors in written:
            if self.has_inference:
                tell_autograd(tensors)
            elif tensors:
                torch.autograd.graph.increment_version(tensors)


_plans: dict[_Key, Plan] = {}
# Those whose tables a graph reads.
_captured: list[Plan] = []


def takes_plan(tensors: Sequence[Tensor]) -> bool:
    """Whether an operation on these may go by a plan: eager mode, and kernels for their device."""
    return bool(tensors) and not is_watched() and uses_triton(tensors[0])


def plan_of(
    operation: str,
    lists: Sequence[list[Tensor]],
    *,
    segment: int,
    check: Callable[[], None],
    singles: Sequence[Tensor] = (),
) -> Plan:
    """The plan of these very tensors, which is made where there is none.

    Args:
        operation: its name; plans of different operations are different.
        lists: read side by side; the first has a tensor in it.
        segment: elements to a program.
        check: raises where the tensors do not fit. Called where a plan is made.
        singles: tensors beside the lists whose addresses are wanted.

    Raises:
        RuntimeError: a graph is captured and tables are missing.
        Whatever `check` raises.
    """
    tensors = [*chain(*lists), *singles]
    identities = list(map(id, tensors))
    device = tensors[0].device
    key = (
        operation,
        identities[0],
        tuple(map(len, (*lists, singles))),
        multi_tensor.stream_of_tables(device),
    )
    plan = _plans.get(key)
    if (
        plan is None
        or plan.identities != identities
        or plan.addresses != list(map(Tensor.data_ptr, tensors))
    ):
        check()
        plan = _made(lists, singles, segment, identities, tensors)
        _remember(key, plan, tensors)
    if not plan.is_captured and capture.is_capturing(device):
        plan.is_captured = True
        _captured.append(plan)
    return plan


def _made(
    lists: Sequence[list[Tensor]],
    singles: Sequence[Tensor],
    segment: int,
    identities: list[int],
    tensors: list[Tensor],
) -> Plan:
    of_lists = tensors[: len(tensors) - len(singles)]
    is_served = survey(tensors) != OWN_DISPATCH and all(t.dtype in TRITON_DTYPES for t in of_lists)
    return Plan(
        identities,
        list(map(Tensor.data_ptr, tensors)),
        is_served,
        multi_tensor.bundles_of(lists, segment) if is_served else (),
        multi_tensor.addresses_of(singles) if is_served and singles else None,
        tensors[0].get_device(),
        any(t.is_inference() for t in tensors),
    )


def _remember(key: _Key, plan: Plan, tensors: list[Tensor]) -> None:
    def forget(_: weakref.ref[Tensor]) -> None:
        if _plans.get(key) is plan_reference():
            _plans.pop(key, None)

    plan_reference = weakref.ref(plan)
    plan.watchers = [weakref.ref(tensor, forget) for tensor in tensors]
    _plans.pop(key, None)  # the new one stands last
    _plans[key] = plan
    while len(_plans) > _NUM_REMEMBERED:
        del _plans[next(iter(_plans))]
