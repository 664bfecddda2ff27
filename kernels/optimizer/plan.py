"""What an operation found out about lists of tensors when it met them first.

A training step goes over the same tensors every time, or over new ones that look the same: views
that are made anew, gradients. To check hundreds of them and to make their tables takes milliseconds
of Python. So there are three ways through here, each shorter than the next:

1. The same tensors at the same addresses: a tenth of a millisecond for some hundreds of them.
2. Others of the same classes, dtypes, shapes and devices, contiguous like those before: lists of
   that look fit, and nothing but addresses is new. Tables of addresses that were met are kept.
3. All else is checked, tensor by tensor. What was found is a `_Look`.

Nothing here holds a tensor alive. That objects of the same identities are the same tensors is
believed while none of them is gone. Such a tensor may have been given other memory, by `data` or
`set_`, and then has another address: it is looked at. One whose strides or sizes alone were changed
in place, as `t_` and `data = data[:n]` do, is not noticed.
Most of the time is in `data_ptr`, a call for each tensor. What is found goes on as bytes, which C
compares and hashes at once.

A CUDA graph that captures a launch reads the plan's tables in every replay: such a plan is kept for
good. A capture makes no tables, see `multi_tensor`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanotron_fast.kernels.optimizer import multi_tensor
from nanotron_fast.kernels.optimizer.multi_tensor import TRITON_DTYPES, Bundle, Group
from nanotron_fast.kernels.runtime import capture
from nanotron_fast.kernels.runtime.backend import uses_triton
from nanotron_fast.kernels.runtime.operators import OWN_DISPATCH, is_watched, survey

# Looks of lists that are remembered: a training step has three or four for each group of
# parameters. And for each of them, plans at addresses that were met.
_NUM_REMEMBERED = 64
NUM_PLANS = 16
_Key = tuple[Any, ...]
_look_of = attrgetter("dtype", "shape", "device")


def _identities(tensors: list[Tensor]) -> bytes:
    """The `id` of each, side by side: a tuple of CPython holds them like that, behind its head."""
    held = tuple(tensors)
    return ctypes.string_at(id(held) + tuple.__basicsize__, tuple.__itemsize__ * len(held))


@dataclass(eq=False, slots=True)
class Plan:
    """Lists of tensors as the launches of an operation take them.

    Args:
        is_served: whether a launch may take them: plain tensors of dtypes that kernels know. If
            not, there are no tables.
        bundles: what each launch takes.
        singles: addresses of the tensors beside the lists, (tensors,) int64 on the device; None
            where there are none.
        device_index: of the GPU; -1 for a CPU.
    """

    is_served: bool
    bundles: tuple[Bundle, ...]
    singles: Tensor | None
    device_index: int


class _Known(NamedTuple):
    """A list whose tensors are the same while its watchers have seen none of them go.

    `packed` are the addresses as plans go by them: the same bytes each time, whose hash is known.
    """

    identities: bytes
    addresses: tuple[int, ...]
    packed: bytes
    watchers: list[weakref.ref[Tensor]]


@dataclass(eq=False, slots=True)
class _Column:
    """One list of a look.

    Args:
        types: classes of its tensors.
        looks: of each of them.
        last: identities of the list that was met last, of tensors that may be gone.
        known: lists that were met twice, by the identity of their first tensor.
    """

    types: set[type]
    looks: list[tuple[Any, ...]]
    last: bytes
    known: dict[int, _Known] = field(default_factory=dict)

    def addresses(self, tensors: list[Tensor]) -> bytes | None:
        """Where the tensors of a list begin; None where they do not look like this."""
        if not tensors:
            return b""
        identities = _identities(tensors)
        found = tuple(map(Tensor.data_ptr, tensors))
        known = self.known.get(id(tensors[0]))
        if known and known.identities == identities and known.addresses == found:
            return known.packed
        if not self._looks_like(tensors):
            return None
        packed = multi_tensor.packed(found)
        if identities == self.last:
            self._watch(tensors, identities, found, packed)
        self.last = identities
        return packed

    def _looks_like(self, tensors: list[Tensor]) -> bool:
        return (
            set(map(type, tensors)) == self.types
            and list(map(_look_of, tensors)) == self.looks
            and all(map(Tensor.is_contiguous, tensors))
        )

    def _watch(self, tensors: list[Tensor], *found: Any) -> None:
        """Knows a list, by what was found of it, until one of its tensors is gone."""
        known, first = self.known, id(tensors[0])

        def forget(_: weakref.ref[Tensor]) -> None:
            known.pop(first, None)

        known[first] = _Known(*found, [weakref.ref(tensor, forget) for tensor in tensors])


@dataclass(eq=False, slots=True)
class _Look:
    """Lists that fit each other, by what they look like.

    Args:
        columns: the lists, and the tensors beside them.
        has_singles: whether there are any beside them.
        groups: of tensors at aligned addresses.
        plans: by the addresses of each column.
    """

    columns: list[_Column]
    has_singles: bool
    is_served: bool
    device: torch.device
    groups: tuple[Group, ...]
    plans: dict[tuple[bytes, ...], Plan] = field(default_factory=dict)

    def plan_at(self, addresses: tuple[bytes, ...], segment: int, stream: int) -> Plan:
        plan = self.plans.get(addresses)
        if plan is None:
            plan = self._made(addresses, segment, stream)
            while len(self.plans) >= NUM_PLANS:
                del self.plans[next(iter(self.plans))]
            self.plans[addresses] = plan
        return plan

    def _made(self, addresses: tuple[bytes, ...], segment: int, stream: int) -> Plan:
        index = -1 if self.device.index is None else self.device.index
        if not self.is_served:
            return Plan(False, (), None, index)
        of_lists, singles = addresses[:-1], addresses[-1]
        groups = self.groups
        if not all(map(multi_tensor.are_aligned, of_lists)):
            starts = [memoryview(each).cast("q").tolist() for each in of_lists]
            groups = _groups(self.columns[:-1], starts)
        table = multi_tensor.table_of(of_lists)
        return Plan(
            True,
            multi_tensor.bundles_at(table, groups, segment, self.device, stream),
            multi_tensor.addresses_at(singles, self.device, stream) if self.has_singles else None,
            index,
        )


def _groups(columns: list[_Column], addresses: Sequence[Sequence[int]]) -> tuple[Group, ...]:
    dtypes = [[look[0] for look in column.looks] for column in columns]
    numels = [look[1].numel() for look in columns[0].looks]
    return multi_tensor.grouped(addresses, dtypes, numels)


_looks: dict[_Key, list[_Look]] = {}


def takes_plan(tensors: Sequence[Tensor]) -> bool:
    """Whether an operation on these may go by a plan: eager mode, and kernels for their device."""
    return len(tensors) > 0 and not is_watched() and uses_triton(tensors[0])


def plan_of(
    operation: str,
    lists: Sequence[list[Tensor]],
    *,
    segment: int,
    check: Callable[[], None],
    singles: list[Tensor] | None = None,
) -> Plan:
    """The plan of these tensors, which is made where there is none.

    Args:
        operation: its name; plans of different operations are different.
        lists: read side by side; the first has a tensor in it.
        segment: elements to a program.
        check: raises where the tensors do not fit. Called where none looked like these before; it
            asks for classes, dtypes, shapes, strides and devices alone.
        singles: tensors beside the lists whose addresses are wanted.

    Raises:
        RuntimeError: a graph is captured and tables are missing.
        Whatever `check` raises.
    """
    columns = (*lists, singles or [])
    device = lists[0][0].device
    stream = multi_tensor.stream_of_tables(device)
    key = (operation, segment, *map(len, columns), device, stream)
    for look in _looks.get(key, ()):
        addresses = _addresses(look, columns)
        if addresses is not None:
            plan = look.plan_at(addresses, segment, stream)
            break
    else:
        check()
        look = _seen(columns, device)
        starts = [list(map(Tensor.data_ptr, tensors)) for tensors in columns]
        addresses = tuple(map(multi_tensor.packed, starts))
        plan = look.plan_at(addresses, segment, stream)
        _remember(key, look)
    return capture.keep(plan, device)


def _addresses(look: _Look, columns: Sequence[list[Tensor]]) -> tuple[bytes, ...] | None:
    """Of each list; None where one does not look like this."""
    found = []
    for column, tensors in zip(look.columns, columns, strict=True):
        addresses = column.addresses(tensors)
        if addresses is None:
            return None
        found.append(addresses)
    return tuple(found)


def _seen(columns: Sequence[list[Tensor]], device: torch.device) -> _Look:
    """What these lists look like, which fit each other."""
    lists = columns[:-1]
    seen = [
        _Column(set(map(type, each)), list(map(_look_of, each)), _identities(each))
        for each in columns
    ]
    is_served = survey(columns) != OWN_DISPATCH and all(
        dtype in TRITON_DTYPES for column in seen[:-1] for dtype, _, _ in column.looks
    )
    groups = _groups(seen[:-1], [(0,) * len(each) for each in lists]) if is_served else ()
    return _Look(seen, bool(columns[-1]), is_served, device, groups)


def _remember(key: _Key, look: _Look) -> None:
    """The one that was met last is asked first."""
    _looks.setdefault(key, []).insert(0, look)
    while sum(map(len, _looks.values())) > _NUM_REMEMBERED:
        oldest = next(iter(_looks))
        _looks[oldest].pop()
        if not _looks[oldest]:
            del _looks[oldest]
