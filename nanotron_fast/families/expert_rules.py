"""Rules of experts that a published model has in one tensor, in the order of our own parameter."""

from __future__ import annotations

from dataclasses import dataclass

from nanotron_fast.families.parts import Address, Cut, Param, Part
from nanotron_fast.families.rules import Context


@dataclass(frozen=True, slots=True)
class InterleavedExperts:
    """(experts, in, n * out), the columns of n matrices in turns, to (experts, in, [n of out]).

    Without `rows` a bias: (experts, n * out). Whole experts go to the ranks of expert parallelism.
    """

    tensor: str
    param: str
    columns: str
    num_matrices: int = 1
    rows: str | None = None
    block: str = "layer"
    when: str | None = None
    layers: str = "moe"

    def expand(self, name: str, context: Context) -> Param:
        """See Rule."""
        experts, columns = context.size("experts"), context.size(self.columns)
        tail = () if self.rows is None else (context.size(self.rows),)
        num = self.num_matrices
        shape = (experts, *tail, num * columns)
        last = len(shape) - 1
        # A dimension of one where there are no rows: its step is none.
        axes, sizes = (0, last - len(tail), last), (experts, *(tail or (1,)), columns)
        inner = 1 if tail else 0
        parts = tuple(
            Part(
                tensors=(
                    Address(
                        self.tensor.format(layer=context.layer),
                        shape,
                        (*(0 for _ in range(last)), place),
                        axes,
                        (1, inner, num),
                    ),
                ),
                param=Address(
                    name,
                    shape,
                    (*(0 for _ in range(last)), place * columns),
                    axes,
                    (1, inner, 1),
                ),
                sizes=(sizes[0], sizes[1], sizes[2]),
                cuts={"ep": Cut(0, "experts")},
            )
            for place in range(num)
        )
        return Param(name, shape, parts, context.layer, cuts={"ep": 0})
