"""A rule for models that publish q, k and v as one tensor, those of each head together."""

from __future__ import annotations

from dataclasses import dataclass

from nanotron_fast.families.parts import Address, Cut, Param, Part
from nanotron_fast.families.rules import Context, Rotary, runs

_TURNED: Rotary = ("rotary_first", "rotary_end")


@dataclass(frozen=True, slots=True)
class FusedByHead:
    """All heads' queries, all keys, all values, of a tensor that has them head by head.

    Its rows are each head's query, key and value; there are as many key-value heads as others.
    `columns` is missing for a bias.
    """

    tensor: str
    param: str
    columns: str | None = None
    block: str = "layer"
    when: str | None = None
    layers: str = "all"

    def expand(self, name: str, context: Context) -> Param:
        columns = 1 if self.columns is None else context.size(self.columns)
        tail = () if self.columns is None else (columns,)
        heads, length = context.size("heads"), context.size("head_dim")
        chunk = heads * length
        shape = (3 * chunk, *tail)
        origin, axes = tuple(0 for _ in tail), (0, 0, len(tail))
        tensor, unit = self.tensor.format(layer=context.layer), "heads"
        parts = tuple(
            Part(
                tensors=(
                    Address(
                        tensor,
                        shape,
                        (place * length + run.tensor.first, *origin),
                        axes,
                        (3 * length, run.tensor.step, len(tail)),
                    ),
                ),
                param=Address(
                    name,
                    shape,
                    (place * chunk + run.param.first, *origin),
                    axes,
                    (length, run.param.step, len(tail)),
                ),
                sizes=(heads, run.length, columns),
                cuts={"tp": Cut(0, unit, place * chunk)},
            )
            for place in range(3)
            for run in runs(name, context, None if place == 2 else _TURNED, length)
        )
        return Param(name, shape, parts, context.layer, cuts={"tp": 0}, chunks=(chunk,) * 3)
