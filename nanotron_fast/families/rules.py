"""The rules that a family's table is written in.

A rule says which Hugging Face tensors make which Nanotron parameter, and expands to a `Param`.
Sizes are written as names: "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab",
"experts", "moe_intermediate", "shared_intermediate". `{layer}` and `{expert}` in a tensor's name
stand for their numbers.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Protocol

from nanotron_fast.errors import UnsupportedModelError
from nanotron_fast.families.parts import Address, Param, Part

# A row count as (number of groups, rows a group), so that whole groups go to a rank: heads.
Rows = tuple[str, str] | str


@dataclass(frozen=True, slots=True)
class Context:
    """What a rule may ask about the model it is expanded for."""

    sizes: Mapping[str, int]
    flags: Container[str]
    # Rotary pairs of a head lie beside each other in Nanotron, instead of half a head apart.
    rope_interleaved: bool
    # Each half of a head is a part of its own: always so when interleaved.
    has_rope_pairs: bool
    layer: int | str

    def size(self, name: str) -> int:
        return self.sizes[name]

    def rows(self, rows: Rows) -> tuple[int, int, str]:
        """(groups, rows a group, what a group is called)."""
        if isinstance(rows, str):
            return self.size(rows), 1, f"rows ({rows})"
        count, length = rows
        return self.size(count), self.size(length), count.replace("_", " ")


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

    hf: str
    param: str
    rows: Rows
    columns: Rows | None = None
    split: str | None = None
    block: str = "layer"
    when: str | None = None
    layers: str = "all"
    is_fp32: bool = False
    alias: str | None = None

    def expand(self, name: str, context: Context) -> Param:
        groups, length, unit = context.rows(self.rows)
        hf_rows = None
        if self.rows == "vocab":
            hf_rows, groups = groups, context.size("padded_vocab")
            unit = "rows of the vocabulary"
        rows = groups * length
        cut: int | None
        if self.columns is None:
            shape: tuple[int, ...] = (rows,)
            sizes, strides = (groups, length, 1), (length, 1, 1)
            axes, steps = (0, 0, 0), (length, 1, 0)
            cut = 0 if self.split == "rows" else None
        else:
            column_groups, column_length, column_unit = context.rows(self.columns)
            columns = column_groups * column_length
            shape = (rows, columns)
            if self.split == "columns":
                sizes, strides = (rows, column_groups, column_length), (columns, column_length, 1)
                axes, steps = (0, 1, 1), (1, column_length, 1)
                cut, unit = 1, column_unit
            else:
                sizes, strides = (groups, length, columns), (length * columns, columns, 1)
                axes, steps = (0, 0, 1), (length, 1, 1)
                cut = 0 if self.split == "rows" else None
        hf_shape = shape if hf_rows is None else (hf_rows, *shape[1:])
        part = Part(
            hf=tuple(
                Address(hf.format(layer=context.layer), hf_shape, 0, strides)
                for hf in (self.hf, self.alias)
                if hf is not None
            ),
            sizes=sizes,
            start=(0,) * len(shape),
            axes=axes,
            steps=steps,
            cut=cut,
            cut_unit=unit,
            hf_rows=hf_rows,
        )
        return Param(
            name,
            shape,
            (part,),
            context.layer,
            split=None if cut is None else axes[cut],
            is_fp32=self.is_fp32,
        )


@dataclass(frozen=True, slots=True)
class Fuse:
    """Several tensors one above the other; each is a chunk that is split over ranks on its own.

    `rotary` says which of them hold rows that a rotary embedding turns in pairs.
    """

    hf: tuple[str, ...]
    param: str
    rows: tuple[Rows, ...]
    columns: str | None = None
    rotary: tuple[bool, ...] = ()
    block: str = "layer"
    when: str | None = None
    layers: str = "all"

    def expand(self, name: str, context: Context) -> Param:
        columns = 1 if self.columns is None else context.size(self.columns)
        tail = () if self.columns is None else (columns,)
        parts: list[Part] = []
        chunks: list[int] = []
        for index, (hf, rows) in enumerate(zip(self.hf, self.rows, strict=True)):
            groups, length, unit = context.rows(rows)
            is_paired = context.has_rope_pairs and index < len(self.rotary) and self.rotary[index]
            if is_paired and length % 2:
                raise UnsupportedModelError(f"{name}: heads of {length} rows have no rotary pairs")
            is_interleaved = is_paired and context.rope_interleaved
            # Interleaved, row p * length/2 + i of a head becomes row 2 * i + p: a part for each p.
            for pair in range(2) if is_paired else range(1):
                pairs = length // 2 if is_paired else length
                parts.append(
                    Part(
                        hf=(
                            Address(
                                name=hf.format(layer=context.layer),
                                shape=(groups * length, *tail),
                                offset=pair * pairs * columns,
                                strides=(length * columns, columns, 1),
                            ),
                        ),
                        sizes=(groups, pairs, columns),
                        start=(
                            sum(chunks) + pair * (1 if is_interleaved else pairs),
                            *(0 for _ in tail),
                        ),
                        axes=(0, 0, len(tail)),
                        steps=(length, 2 if is_interleaved else 1, len(tail)),
                        cut=0,
                        cut_unit=unit,
                        chunk_start=sum(chunks),
                    )
                )
            chunks.append(groups * length)
        return Param(
            name,
            (sum(chunks), *tail),
            tuple(parts),
            context.layer,
            split=0,
            chunks=tuple(chunks),
        )


@dataclass(frozen=True, slots=True)
class FuseByKvHead:
    """q, k and v with the rows of each kv head together: its query heads, its key, its value."""

    hf: tuple[str, str, str]
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
        parts = tuple(
            Part(
                hf=(
                    Address(
                        name=hf.format(layer=context.layer),
                        shape=(kv_heads * rows, *tail),
                        offset=0,
                        strides=(rows * columns, columns, 1),
                    ),
                ),
                sizes=(kv_heads, rows, columns),
                start=(first_row, *(0 for _ in tail)),
                axes=(0, 0, len(tail)),
                steps=(group_rows, 1, len(tail)),
                cut=0,
                cut_unit="kv heads",
            )
            for hf, rows, first_row in zip(
                self.hf,
                (query_rows, head_dim, head_dim),
                (0, query_rows, query_rows + head_dim),
                strict=True,
            )
        )
        return Param(name, (kv_heads * group_rows, *tail), parts, context.layer, split=0)


@dataclass(frozen=True, slots=True)
class StackExperts:
    """The matrices of all experts in one parameter, transposed, side by side: (experts, in, out).

    Hugging Face has a tensor for each expert and matrix, (out, in); or `hf_stacked`, all of them
    in one, (experts, out, in), which is read where it is there. Experts are not split over ranks.
    """

    hf: tuple[str, ...]
    hf_stacked: str
    param: str
    rows: str
    columns: str
    block: str = "layer"
    when: str | None = None
    layers: str = "moe"

    def expand(self, name: str, context: Context) -> Param:
        experts = context.size("experts")
        rows, columns = context.size(self.rows), context.size(self.columns)
        width = rows * len(self.hf)
        stacked = self.hf_stacked.format(layer=context.layer)
        parts = tuple(
            Part(
                hf=(
                    Address(
                        name=hf.format(layer=context.layer, expert=expert),
                        shape=(rows, columns),
                        offset=0,
                        strides=(1, columns, 0),
                    ),
                    Address(
                        name=stacked,
                        shape=(experts, width, columns),
                        offset=(expert * width + index * rows) * columns,
                        strides=(1, columns, 0),
                    ),
                ),
                sizes=(columns, rows, 1),
                start=(expert, 0, index * rows),
                axes=(1, 2, 0),
                steps=(1, 1, 0),
            )
            for expert in range(experts)
            for index, hf in enumerate(self.hf)
        )
        return Param(name, (experts, columns, width), parts, context.layer)
