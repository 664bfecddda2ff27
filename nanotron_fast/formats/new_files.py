"""Files of a published model that are to be written: which tensors go into which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nanotron_fast.moves.dtypes import Dtype

# Its name, its dtype, its shape.
NamedTensor = tuple[str, Dtype, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file to be written: its size, where its tensors start, and what else is in it.

    Args:
        header: what it begins with.
        literals: bytes at other places, by their offsets.
    """

    name: str
    size_bytes: int
    offsets: dict[str, int]
    header: bytes = b""
    literals: tuple[tuple[int, bytes], ...] = ()


def grouped(tensors: Sequence[NamedTensor], max_file_bytes: int) -> list[list[NamedTensor]]:
    """The tensors of each file, in their order.

    A file is closed before the tensor that would take it over `max_file_bytes`, so a larger tensor
    has one to itself.
    """
    groups: list[list[NamedTensor]] = [[]]
    used = 0
    for tensor in tensors:
        num_bytes = bytes_of(tensor)
        if groups[-1] and used + num_bytes > max_file_bytes:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += num_bytes
    return groups


def bytes_of(tensor: NamedTensor) -> int:
    """What a tensor takes."""
    _, dtype, shape = tensor
    return math.prod(shape) * dtype.itemsize
