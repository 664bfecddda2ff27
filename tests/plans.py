"""Random plans that tile their outputs exactly, as hypothesis strategies, and the files they read.

Every tensor lands in one of a few shapes that conversions have; sources have gaps, outputs none,
and nothing is aligned.
"""

import itertools
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
from hypothesis import strategies as st

from nanotron_fast.moves import shares
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.move import Move
from nanotron_fast.moves.plan import MovePlan, OutputFile
from nanotron_fast.moves.row import FILL
from tests.strides import packed, permuted

NUM_SOURCES = 3
OUTPUT_PATHS = ("a", "b/tp-0", "b/tp-1", "c/tp-0", "c/tp-1")
CASTABLE = (Dtype.BF16, Dtype.F16, Dtype.F32)


class Builder:
    """Collects moves; a tensor is taken where the last one in its file ended."""

    def __init__(self, headers, gaps):
        self.headers = headers
        self.gaps = itertools.cycle(gaps)
        self.source_sizes = [0] * NUM_SOURCES
        self.output_sizes = [len(header) for header in headers]
        self.moves = []

    def take_source(self, file, num_bytes):
        offset = self.source_sizes[file] + next(self.gaps)
        self.source_sizes[file] = offset + num_bytes
        return offset

    def take_output(self, file, num_bytes):
        offset = self.output_sizes[file]
        self.output_sizes[file] = offset + num_bytes
        return offset

    def plan(self, folder):
        return MovePlan(
            tuple(Path(folder) / f"source-{i}" for i in range(NUM_SOURCES)),
            tuple(map(OutputFile, OUTPUT_PATHS, self.headers, self.output_sizes)),
            tuple(self.moves),
        )


def add_box(build, draw, sizes, dtypes):
    """A whole tensor, its dimensions in any order on both sides; or zeros."""
    shape = tuple(draw(sizes) for _ in range(3))
    orders = st.permutations(range(3))
    source = draw(st.integers(FILL, NUM_SOURCES - 1))
    count = int(np.prod(shape))
    destination = draw(st.integers(0, len(OUTPUT_PATHS) - 1))
    build.moves.append(
        Move(
            source,
            0 if source == FILL else build.take_source(source, count * dtypes[0].itemsize),
            destination,
            build.take_output(destination, count * dtypes[1].itemsize),
            shape,
            permuted(shape, draw(orders)),
            permuted(shape, draw(orders)),
            *dtypes,
        )
    )


def add_again(build, draw, sizes, dtypes):
    """What another move reads already, in another order: tied weights are written twice."""
    read = [move for move in build.moves if move.source != FILL]
    if not read:
        return add_box(build, draw, sizes, dtypes)
    move = draw(st.sampled_from(read))
    order = draw(st.permutations(range(3)))
    destination = draw(st.integers(0, len(OUTPUT_PATHS) - 1))
    num_bytes = move.num_elements * move.destination_dtype.itemsize
    build.moves.append(
        replace(
            move,
            destination=destination,
            destination_offset=build.take_output(destination, num_bytes),
            destination_strides=permuted(move.sizes, order),
        )
    )


def add_shards(build, draw, sizes, dtypes):
    """One tensor on one side, cut along one dimension, and its shards in several files.

    The cuts make contiguous shares, or every n-th row, column or plane. A shard may lie transposed.
    Joins may hold a shard of zeros.
    """
    joins, interleaves = draw(st.booleans()), draw(st.booleans())
    dim, ranks = draw(st.integers(0, 2)), draw(st.integers(2, 4))
    narrow = [draw(sizes) for _ in range(3)]
    orders = st.permutations(range(3))
    widths = [narrow[dim] if interleaves else draw(sizes) for _ in range(ranks)]
    wide = (*narrow[:dim], sum(widths), *narrow[dim + 1 :])
    num_whole, num_shard = int(np.prod(wide)), int(np.prod(narrow)) // narrow[dim]
    file = draw(st.integers(0, (len(OUTPUT_PATHS) if joins else NUM_SOURCES) - 1))
    whole_dtype, shard_dtype = reversed(dtypes) if joins else dtypes
    take_whole, take_shard = build.take_source, build.take_output
    if joins:
        take_whole, take_shard = take_shard, take_whole
    whole = take_whole(file, num_whole * whole_dtype.itemsize)
    strides = packed(wide)
    order = draw(orders)
    for rank, width in enumerate(widths):
        shape = (*narrow[:dim], width, *narrow[dim + 1 :])
        first = rank if interleaves else sum(widths[:rank])
        at = whole + first * strides[dim] * whole_dtype.itemsize
        step = tuple(s * (ranks if interleaves and d == dim else 1) for d, s in enumerate(strides))
        other = rank % (NUM_SOURCES if joins else len(OUTPUT_PATHS))
        if joins and draw(st.integers(0, 9)) == 0:
            build.moves.append(Move(FILL, 0, file, at, shape, (0, 0, 0), step, *dtypes))
            continue
        shard = take_shard(other, num_shard * width * shard_dtype.itemsize)
        inside = permuted(shape, order if joins else (0, 1, 2))
        if joins:
            build.moves.append(Move(other, shard, file, at, shape, inside, step, *dtypes))
        else:
            build.moves.append(Move(file, at, other, shard, shape, step, inside, *dtypes))


@st.composite
def builders(draw, max_size=9, *, aligned=False):
    """A Builder with a few tensors; their moves are shuffled.

    Aligned ones have all elements at multiples of their size, of which there is one in all outputs.
    """
    headers = [draw(st.binary(max_size=9)) for _ in OUTPUT_PATHS]
    if aligned:
        headers = [bytes(8 * (len(header) % 3)) for header in headers]
    only = draw(st.sampled_from([Dtype.BF16, Dtype.F32, Dtype.F64]))
    build = Builder(headers, draw(st.lists(st.integers(0, 5), min_size=1, max_size=5)))
    sizes = st.one_of(st.integers(1, 3), st.integers(1, max_size))
    for _ in range(draw(st.integers(1, 6))):
        source = draw(st.sampled_from(Dtype))
        casts = source in CASTABLE and draw(st.booleans())
        destination = draw(st.sampled_from(CASTABLE)) if casts else source
        if aligned:
            destination = only
            source = draw(st.sampled_from(CASTABLE)) if only in CASTABLE else only
        add = draw(st.sampled_from([add_box, add_shards, add_shards, add_again]))
        add(build, draw, sizes, (source, destination))
    build.moves = draw(st.permutations(build.moves))
    return build


def write_sources(build, folder, seed=0):
    """Random bytes for every source, behind whose end the plan reads nothing."""
    random = np.random.default_rng(seed)
    for i, size in enumerate(build.source_sizes):
        (folder / f"source-{i}").write_bytes(random.bytes(size))
    return build.plan(folder)


@contextmanager
def small_cuts(multiple_bytes=8):
    """Files of any size are cut, at multiples of these bytes, as large ones are."""
    with (
        patch.object(shares, "CUT_MULTIPLE_BYTES", multiple_bytes),
        patch.object(shares, "CUT_OVER_BYTES", 0),
    ):
        yield
