"""The packer as an operator of torch's library."""

from __future__ import annotations

from torch import Tensor

from nanotron_fast.kernels.pack import choice
from nanotron_fast.kernels.runtime.operators import operator


@operator("nanotron_fast::pack", mutates_args=("destinations",))
def pack(table: Tensor, sources: list[Tensor], destinations: list[Tensor]) -> None:
    """Carries out a table (moves, columns) int64 on the CPU between tensors of one device."""
    choice.run(table, sources, destinations)
