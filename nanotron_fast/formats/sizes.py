"""What a size, a place in a file and a shape may be: documents come from strangers."""

from __future__ import annotations

from typing import Any, TypeGuard

MAX_SIZE = 2**63 - 1
# As many as a tensor of torch's may have: the product of more would take long to find.
MAX_DIMS = 64


def is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE


def are_sizes(values: Any) -> bool:
    """Whether they are those of a tensor's dimensions."""
    is_shape = isinstance(values, (tuple, list)) and len(values) <= MAX_DIMS
    return is_shape and all(map(is_size, values))
