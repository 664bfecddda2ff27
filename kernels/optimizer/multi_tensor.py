"""Tables on the device that let one launch work on lists of tensors.

Lists of equal length (parameters, gradients, ...) are read side by side: row i of each belongs to
tensor i. A tensor is cut into segments; a program handles one segment of one tensor, in all lists:

    segment_tensors (segments,) int32    which tensor a segment belongs to
    extents (3, tensors) int64           elements; first segment; place in the caller's lists
    addresses (lists, tensors) int64     where each tensor starts

One launch takes one combination of dtypes, and either only tensors that allow wide accesses or only
others: a `Bundle`. Wide is 16 bytes of the widest dtype, and the same number of elements of the
others: four of fp32 and of bf16 beside it, so that a warp's accesses lie side by side in each list.
Tables are kept, keyed by addresses, sizes and dtypes, so that a step on the tensors of the last one
looks up a dictionary and copies nothing to the device; `plan` saves it even that. A table holds no
tensor alive; an address that is used again for a tensor of the same size and dtype means the same.
Tables belong to the stream that filled them. A capture of a CUDA graph takes those that were filled
last, and fills none (`capture` says why): run once on the same tensors before it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanotron_fast.kernels.optimizer import shards
from nanotron_fast.kernels.runtime import capture
from nanotron_fast.kernels.runtime.backend import is_interpreting, uses_triton

# How many sets of lists are remembered; a training step uses three or four.
_NUM_REMEMBERED = 64
_ACCESS_BYTES = 16
# What the lowest byte may be of an address that allows such an access.
_MULTIPLES = bytes(range(0, 256, _ACCESS_BYTES))

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Bundle:
    """What one launch works on."""

    dtypes: tuple[torch.dtype, ...]
    # Elements of an access: every address and size in the bundle is a multiple of it.
    vector: int
    num_tensors: int
    num_segments: int
    segment_tensors: Tensor
    extents: Tensor
    addresses: Tensor

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """The first arguments of a kernel, for `find_segment` and `pointer`."""
        return self.segment_tensors, self.extents, self.addresses, self.num_tensors


# The stream on which each device was last asked for tables outside a capture.
_last_streams: dict[torch.device, int] = {}


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    capture.refuse_if_capturing(device, "an operation on lists of tensors that are new to it")
    # Pinned, so that the host need not wait for the kernels in flight.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@lru_cache(maxsize=_NUM_REMEMBERED)
def _layout(
    numels: tuple[int, ...],
    places: tuple[int, ...],
    segment: int,
    device: torch.device,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """segment_tensors and extents, which tensors that move to new addresses keep."""
    sizes = torch.tensor(numels, dtype=torch.int64)
    counts = (sizes + (segment - 1)) // segment
    extents = torch.stack((sizes, counts.cumsum(0) - counts, torch.tensor(places)))
    segment_tensors = torch.arange(len(numels), dtype=torch.int32).repeat_interleave(counts)
    return _to_device(segment_tensors, device), _to_device(extents, device)


class Group(NamedTuple):
    """Tensors of one launch: what a `Bundle` is made of, apart from addresses."""

    dtypes: tuple[torch.dtype, ...]
    vector: int
    places: tuple[int, ...]
    numels: tuple[int, ...]


def _vector(dtypes: tuple[torch.dtype, ...], starts: list[int], numel: int) -> int:
    """Elements of the widest access that these tensors allow."""
    vector = _ACCESS_BYTES // max(dtype.itemsize for dtype in dtypes)
    fits = all(
        start % (vector * dtype.itemsize) == 0 for start, dtype in zip(starts, dtypes, strict=True)
    )
    return vector if fits and numel % vector == 0 else 1


def packed(addresses: Sequence[int]) -> bytes:
    """Addresses side by side, eight bytes each: compared, hashed and freed as one."""
    return struct.pack(f"{len(addresses)}q", *addresses)


def are_aligned(addresses: bytes) -> bool:
    """Whether all of them allow the widest access: then groups do not depend on them."""
    lowest_bytes = addresses[::8]
    return not lowest_bytes.translate(None, _MULTIPLES)


def table_of(addresses: Sequence[bytes]) -> Tensor:
    """(lists, tensors) int64, on the CPU."""
    table = torch.frombuffer(bytearray(b"".join(addresses)), dtype=torch.int64)
    return table.view(len(addresses), -1)


def grouped(
    addresses: Sequence[Sequence[int]],
    dtypes: Sequence[Sequence[torch.dtype]],
    numels: Sequence[int],
) -> tuple[Group, ...]:
    """The launches that cover the lists; empty tensors are left out."""
    members: dict[tuple[tuple[torch.dtype, ...], int], list[int]] = {}
    for place, numel in enumerate(numels):
        if numel:
            combination = tuple([column[place] for column in dtypes])
            starts = [column[place] for column in addresses]
            vector = _vector(combination, starts, numel)
            members.setdefault((combination, vector), []).append(place)
    return tuple(
        Group(*kind, tuple(places), tuple([numels[place] for place in places]))
        for kind, places in members.items()
    )


def bundles_at(
    table: Tensor,
    groups: Sequence[Group],
    segment: int,
    device: torch.device,
    stream: int,
) -> tuple[Bundle, ...]:
    """What the launches take, for tensors that start where the table of all lists says."""
    if is_interpreting() and device.type != "cpu":
        raise RuntimeError(f"Triton's interpreter cannot follow addresses on {device}")
    bundles = []
    for dtypes, vector, places, numels in groups:
        segment_tensors, extents = _layout(numels, places, segment, device, stream)
        is_whole = len(places) == table.shape[1]
        own = table if is_whole else table[:, list(places)]
        bundles.append(
            Bundle(
                dtypes=dtypes,
                vector=vector,
                num_tensors=len(places),
                num_segments=segment_tensors.numel(),
                segment_tensors=segment_tensors,
                extents=extents,
                addresses=_to_device(own, device),
            )
        )
    return tuple(bundles)


@lru_cache(maxsize=_NUM_REMEMBERED)
def _bundles(
    addresses: tuple[tuple[int, ...], ...],
    dtypes: tuple[tuple[torch.dtype, ...], ...],
    numels: tuple[int, ...],
    segment: int,
    device: torch.device,
    stream: int,
) -> tuple[Bundle, ...]:
    groups = grouped(addresses, dtypes, numels)
    table = table_of([packed(column) for column in addresses])
    return bundles_at(table, groups, segment, device, stream)


@lru_cache(maxsize=_NUM_REMEMBERED)
def addresses_at(addresses: bytes, device: torch.device, stream: int) -> Tensor:
    """(tensors,) int64 on a device."""
    return _to_device(table_of([addresses])[0], device)


def stream_of_tables(device: torch.device) -> int:
    """The stream whose tables to take."""
    if device.type != "cuda":
        return 0
    current = int(torch.cuda.current_stream(device).cuda_stream)
    # torch waits for the device before it captures: what the warm-up filled is there.
    if capture.is_capturing(device):
        return _last_streams.get(device, current)
    _last_streams[device] = current
    return current


def bundles_of(lists: Sequence[Sequence[Tensor]], segment: int) -> tuple[Bundle, ...]:
    """What the launches take that cover these lists, with `segment` elements to a program.

    All tensors are contiguous, on one device, and of equal size along the lists.
    """
    first = lists[0]
    if not first:
        return ()
    device = first[0].device
    bundles = _bundles(
        tuple(tuple(map(Tensor.data_ptr, tensors)) for tensors in lists),
        tuple(tuple([tensor.dtype for tensor in tensors]) for tensors in lists),
        tuple([tensor.numel() for tensor in first]),
        segment,
        device,
        stream_of_tables(device),
    )
    return capture.keep(bundles, device)


def addresses_of(tensors: Sequence[Tensor]) -> Tensor:
    """(tensors,) int64 on the device of the first."""
    device = tensors[0].device
    addresses = addresses_at(
        packed([tensor.data_ptr() for tensor in tensors]), device, stream_of_tables(device)
    )
    return capture.keep(addresses, device)


def takes_reference(tensors: Sequence[Tensor]) -> bool:
    """Whether an operation on these tensors runs in plain torch."""
    return not uses_triton(tensors[0]) or any(t.dtype not in TRITON_DTYPES for t in tensors)


def check_lists(name: str, first: str, **lists: Sequence[Tensor]) -> None:
    """Holds lists to what a launch needs: equal shapes along the lists, contiguous, one device.

    Raises ValueError that names the operation, the list, the place in it and what was found.
    """
    leaders = lists[first]
    for label, tensors in lists.items():
        if len(tensors) != len(leaders):
            raise ValueError(f"{name}: {len(tensors)} {label} for {len(leaders)} {first}")
    if not leaders:
        return
    shapes, device = [leader.shape for leader in leaders], leaders[0].device
    for label, tensors in lists.items():
        fits = (
            [tensor.shape for tensor in tensors] == shapes
            and all(tensor.is_contiguous() for tensor in tensors)
            and all(tensor.device == device for tensor in tensors)
            and all(tensor.is_floating_point() for tensor in tensors)
            and not shards.are_among(tensors)
        )
        if not fits:
            _raise_for(name, first, leaders, label, tensors)


def _raise_for(
    name: str, first: str, leaders: Sequence[Tensor], label: str, tensors: Sequence[Tensor]
) -> None:
    """Names the tensor of a list that does not fit."""
    for place, (tensor, leader) in enumerate(zip(tensors, leaders, strict=True)):
        if tensor.shape != leader.shape:
            raise ValueError(
                f"{name}: {label}[{place}] {tuple(tensor.shape)} "
                f"for {first}[{place}] {tuple(leader.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name}: {label}[{place}] {tuple(tensor.shape)} has strides "
                f"{tensor.stride()}: tensors must be contiguous"
            )
        if tensor.device != leaders[0].device:
            raise ValueError(
                f"{name}: {label}[{place}] on {tensor.device}, {first}[0] on {leaders[0].device}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: {label}[{place}] is {tensor.dtype}")
        if shards.are_among([tensor]):
            raise ValueError(
                f"{name}: {label}[{place}] is a DTensor where {first}[{place}] is a plain tensor"
            )


@triton.jit
def find_segment(
    segment_tensors_ptr, extents_ptr, num_tensors, SEGMENT: tl.constexpr, VECTOR: tl.constexpr
):
    """This program's tensor, the first element of its segment and the tensor's elements."""
    segment = tl.program_id(0)
    tensor = tl.load(segment_tensors_ptr + segment)
    numel = tl.load(extents_ptr + tensor)
    first_segment = tl.load(extents_ptr + num_tensors + tensor)
    return tensor, (segment - first_segment) * SEGMENT, tl.multiple_of(numel, VECTOR)


@triton.jit
def pointer(
    addresses_ptr,
    num_tensors,
    tensor,
    LIST: tl.constexpr,
    DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Where a tensor of one of the lists starts."""
    address = tl.load(addresses_ptr + LIST * num_tensors + tensor)
    # The hint must stand on the pointer: the cast forgets one on the integer.
    start_ptr = address.to(tl.pointer_type(DTYPE))
    return tl.multiple_of(start_ptr, VECTOR * (DTYPE.primitive_bitwidth // 8))
