"""The rules that a family's table is written in.

A rule says which tensors of the published model make which parameter, and expands to a `Param`.
Sizes are written as names: "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab",
"experts", "moe_intermediate", "shared_intermediate". `{layer}` and `{expert}` in a tensor's name
stand for their numbers.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from nanotron_fast.errors import UnsupportedModelError
from nanotron_fast.families.parts import Address, Cut, Param, Part, Seat
from nanotron_fast.model.spread import Heads

# A row count as (number of groups, rows a group), so that whole groups go to a rank: heads.
Rows = tuple[str, str] | str
# The rows of a head that a rotary embedding turns, by the names of the first and the end.
Rotary = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Context:
    """What a rule may ask about the model, and the layer, that it is expanded for."""

    sizes: Mapping[str, int]
    flags: Container[str]
    # Rotary pairs of a head lie beside each other in Nanotron, instead of half a head apart.
    rope_interleaved: bool
    # Each half of a rotary range is a part of its own: always so when interleaved.
    has_rope_pairs: bool
    layer: int | str
    # The same pairs in the tensors of the published model: torchtitan has them beside each other.
    tensors_interleaved: bool = False
    # Where there are fewer key-value heads than ranks, several ranks have a copy of each.
    copies_kv_heads: bool = False

    def size(self, name: str) -> int:
        return self.sizes[name]

    def rows(self, rows: Rows) -> tuple[int, int, str]:
        """(groups, rows a group, what a group is called)."""
        if isinstance(rows, str):
            return self.size(rows), 1, f"rows ({rows})"
        count, length = rows
        return self.size(count), self.size(length), count.replace("_", " ")

    def heads(self, rows: Rows, *, num_divided: int = 0) -> Heads | None:
        """The key-value heads that rows are counted in, where ranks may have copies of them."""
        if not self.copies_kv_heads or isinstance(rows, str) or rows[0] != "kv_heads":
            return None
        return Heads(self.size("kv_heads"), num_divided)


class Rule(Protocol):
    """One line of a family's table."""

    @property
    def param(self) -> str: ...
    @property
    def when(self) -> str | None: ...
    @property
    def layers(self) -> str: ...
    @property
    def block(self) -> str: ...

    def expand(self, name: str, context: Context) -> Param: ...


@dataclass(frozen=True, slots=True)
class Copy:
    """One tensor is one parameter, of the same shape.

    `split` is "rows" or "columns" where tensor parallelism splits it. `columns` is missing for a
    vector. `alias` is another name that the tensor may have in a file that is read.
    """

    tensor: str
    param: str
    rows: Rows
    columns: Rows | None = None
    split: str | None = None
    block: str = "layer"
    when: str | None = None
    layers: str = "all"
    is_fp32: bool = False
    alias: str | None = None
    is_frozen: bool = False

    def expand(self, name: str, context: Context) -> Param:
        groups, length, unit = context.rows(self.rows)
        unpadded = None
        if self.rows == "vocab":
            unpadded, groups = groups, context.size("padded_vocab")
            unit = "rows of the vocabulary"
        rows = groups * length
        shape: tuple[int, ...] = (rows,)
        sizes, axes, steps = (groups, length, 1), (0, 0, 0), (length, 1, 0)
        heads = context.heads(self.rows) if self.split == "rows" else None
        cut = Cut(0, unit, heads=heads)
        if self.columns is not None:
            column_groups, column_length, column_unit = context.rows(self.columns)
            columns = column_groups * column_length
            shape = (rows, columns)
            if self.split == "columns":
                sizes = (rows, column_groups, column_length)
                axes, steps = (0, 1, 1), (1, column_length, 1)
                cut = Cut(1, column_unit)
            else:
                sizes, axes, steps = (groups, length, columns), (0, 0, 1), (length, 1, 1)
        start = (0,) * len(shape)
        tensor_shape = shape if unpadded is None else (unpadded, *shape[1:])
        names = (self.tensor, *(() if self.alias is None else (self.alias,)))
        part = Part(
            tensors=tuple(
                Address(each.format(layer=context.layer), tensor_shape, start, axes, steps)
                for each in names
            ),
            param=Address(name, shape, start, axes, steps),
            sizes=sizes,
            cuts={} if self.split is None else {"tp": cut},
            unpadded_rows=unpadded,
        )
        return Param(
            name,
            shape,
            (part,),
            context.layer,
            cuts={axis: axes[each.dim] for axis, each in part.cuts.items()},
            heads=() if heads is None else (heads,),
            is_fp32=self.is_fp32,
            is_frozen=self.is_frozen,
        )


@dataclass(frozen=True, slots=True)
class Number:
    """A tensor of one element is a parameter of one, which every rank has.

    `is_scalar`: the tensor has no dimensions. `initial`, `is_frozen`: as of Param.
    """

    tensor: str
    param: str
    initial: float
    is_scalar: bool = False
    is_frozen: bool = False
    block: str = "layer"
    when: str | None = None
    layers: str = "all"

    def expand(self, name: str, context: Context) -> Param:
        shape = () if self.is_scalar else (1,)
        tensor = self.tensor.format(layer=context.layer)
        axes = steps = (0, 0, 0)
        part = Part(
            tensors=(Address(tensor, shape, (0,) * len(shape), axes, steps),),
            param=Address(name, (1,), (0,), axes, steps),
            sizes=(1, 1, 1),
        )
        return Param(
            name,
            (1,),
            (part,),
            context.layer,
            is_frozen=self.is_frozen,
            initial=self.initial,
        )


@dataclass(frozen=True, slots=True)
class Fuse:
    """Several tensors one above the other; each is a chunk that is split over ranks on its own.

    One tensor by itself holds all chunks, in the same order. `rotary` says which rows of a head a
    rotary embedding turns, for each chunk that has heads to turn: names of sizes, the first row and
    the end.
    """

    tensors: tuple[str, ...] | str
    param: str
    rows: tuple[Rows, ...]
    columns: str | None = None
    rotary: tuple[Rotary | None, ...] = ()
    block: str = "layer"
    when: str | None = None
    layers: str = "all"

    def expand(self, name: str, context: Context) -> Param:
        columns = 1 if self.columns is None else context.size(self.columns)
        tail = () if self.columns is None else (columns,)
        widths = [groups * length for groups, length, _ in map(context.rows, self.rows)]
        shape = (sum(widths), *tail)
        axes = (0, 0, len(tail))
        parts: list[Part] = []
        is_one = isinstance(self.tensors, str)
        tensors = (self.tensors,) * len(widths) if isinstance(self.tensors, str) else self.tensors
        chunk_start = 0
        for index, (tensor, rows) in enumerate(zip(tensors, self.rows, strict=True)):
            groups, length, unit = context.rows(rows)
            first_row, num_rows = (chunk_start, sum(widths)) if is_one else (0, groups * length)
            rotary = self.rotary[index] if index < len(self.rotary) else None
            heads = context.heads(rows)
            for run in runs(name, context, rotary, length):
                parts.append(
                    Part(
                        tensors=(
                            Address(
                                tensor.format(layer=context.layer),
                                (num_rows, *tail),
                                (first_row + run.tensor.first, *(0 for _ in tail)),
                                axes,
                                (length, run.tensor.step, len(tail)),
                            ),
                        ),
                        param=Address(
                            name,
                            shape,
                            (chunk_start + run.param.first, *(0 for _ in tail)),
                            axes,
                            (length, run.param.step, len(tail)),
                        ),
                        sizes=(groups, run.length, columns),
                        cuts={"tp": Cut(0, unit, chunk_start, heads)},
                    )
                )
            chunk_start += groups * length
        return Param(
            name,
            shape,
            tuple(parts),
            context.layer,
            cuts={"tp": 0},
            chunks=tuple(widths),
            heads=_any(tuple(map(context.heads, self.rows))),
        )


def _any(heads: tuple[Heads | None, ...]) -> tuple[Heads | None, ...]:
    """Empty where no chunk has any."""
    return heads if any(heads) else ()


class _Rows(NamedTuple):
    """Rows of a head: the first, and how far each is from the one before."""

    first: int
    step: int = 1


class _Run(NamedTuple):
    """As many rows of a head, as a tensor has them and as the parameter has them."""

    length: int
    tensor: _Rows
    param: _Rows


def runs(name: str, context: Context, rotary: Rotary | None, length: int) -> list[_Run]:
    """The runs that a head of `length` rows consists of. Raises UnsupportedModelError.

    Interleaved, row p * half + i of a rotary range becomes its row 2 * i + p: a run for each p.
    """
    if rotary is None or not context.has_rope_pairs:
        return [_Run(length, _Rows(0), _Rows(0))]
    first, end = map(context.size, rotary)
    if (end - first) % 2:
        raise UnsupportedModelError(f"{name}: heads of {end - first} rows have no rotary pairs")
    half = (end - first) // 2

    def turned(pair: int, is_interleaved: bool) -> _Rows:
        return _Rows(first + pair, 2) if is_interleaved else _Rows(first + pair * half)

    runs = [
        _Run(first, _Rows(0), _Rows(0)),
        *(
            _Run(
                half,
                turned(pair, context.tensors_interleaved),
                turned(pair, context.rope_interleaved),
            )
            for pair in range(2)
        ),
        _Run(length - end, _Rows(end), _Rows(end)),
    ]
    return [run for run in runs if run.length]


@dataclass(frozen=True, slots=True)
class FuseByKvHead:
    """q, k and v with the rows of each kv head together: its query heads, its key, its value."""

    tensors: tuple[str, str, str]
    param: str
    columns: str | None = None
    block: str = "layer"
    when: str | None = None
    layers: str = "all"

    def expand(self, name: str, context: Context) -> Param:
        columns = 1 if self.columns is None else context.size(self.columns)
        tail = () if self.columns is None else (columns,)
        kv_heads, head_dim = context.size("kv_heads"), context.size("head_dim")
        query_rows = context.size("heads") // kv_heads * head_dim
        group_rows = query_rows + 2 * head_dim
        shape = (kv_heads * group_rows, *tail)
        origin, axes = tuple(0 for _ in tail), (0, 0, len(tail))
        heads = context.heads(("kv_heads", "head_dim"), num_divided=query_rows)
        parts = tuple(
            Part(
                tensors=(
                    Address(
                        tensor.format(layer=context.layer),
                        (kv_heads * rows, *tail),
                        (0, *origin),
                        axes,
                        (rows, 1, len(tail)),
                    ),
                ),
                param=Address(name, shape, (first_row, *origin), axes, (group_rows, 1, len(tail))),
                sizes=(kv_heads, rows, columns),
                cuts={"tp": Cut(0, "kv heads", heads=heads)},
            )
            for tensor, rows, first_row in zip(
                self.tensors,
                (query_rows, head_dim, head_dim),
                (0, query_rows, query_rows + head_dim),
                strict=True,
            )
        )
        of_all = () if heads is None else (heads,)
        return Param(name, shape, parts, context.layer, cuts={"tp": 0}, heads=of_all)


@dataclass(frozen=True, slots=True)
class StackExperts:
    """The matrices of all experts in one parameter, transposed, side by side: (experts, in, out).

    A published model has a tensor for each expert and matrix, (out, in); or `stacked`, all of them
    in one, (experts, out, in), which is read where it is there. Whole experts go to the ranks of
    expert parallelism.
    """

    tensors: tuple[str, ...]
    stacked: str
    param: str
    rows: str
    columns: str
    block: str = "layer"
    when: str | None = None
    layers: str = "moe"

    def expand(self, name: str, context: Context) -> Param:
        experts = context.size("experts")
        rows, columns = context.size(self.rows), context.size(self.columns)
        width = rows * len(self.tensors)
        shape = (experts, columns, width)
        stacked = self.stacked.format(layer=context.layer)
        parts = tuple(
            Part(
                tensors=(
                    Address(
                        tensor.format(layer=context.layer, expert=expert),
                        (rows, columns),
                        (0, 0),
                        (1, 0, 0),
                        (1, 1, 0),
                    ),
                    Address(
                        stacked,
                        (experts, width, columns),
                        (expert, index * rows, 0),
                        (2, 1, 0),
                        (1, 1, 0),
                    ),
                ),
                param=Address(name, shape, (expert, 0, index * rows), (1, 2, 0), (1, 1, 0)),
                sizes=(columns, rows, 1),
                seats={"ep": Seat(expert, experts)},
            )
            for expert in range(experts)
            for index, tensor in enumerate(self.tensors)
        )
        return Param(name, shape, parts, context.layer, cuts={"ep": 0})
