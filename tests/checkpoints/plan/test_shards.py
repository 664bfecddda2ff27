"""From shards at one topology to shards at another, and runs of them, against numpy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotron_fast.checkpoints.plan.shards import ShardPlanner, Share, plan_shards
from nanotron_fast.errors import CheckpointError, UnmovableError
from nanotron_fast.formats.nanotron.slices import SlicesPair, shard_pairs
from nanotron_fast.moves import engine
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.numpy_engine import apply_move
from nanotron_fast.moves.plan import MovePlan, OutputFile

NUMPY = {Dtype.F16: np.float16, Dtype.F32: np.float32, Dtype.F64: np.float64}


@dataclass(frozen=True)
class Layout:
    """How a tensor is split over tensor-parallel ranks, each chunk of a dimension on its own."""

    shape: tuple[int, ...]
    dim: int
    chunks: tuple[int, ...]

    def shard(self, whole: np.ndarray, tp: int, rank: int) -> np.ndarray:
        ends = np.cumsum(self.chunks)[:-1]
        parts = [np.split(each, tp, self.dim)[rank] for each in np.split(whole, ends, self.dim)]
        return np.concatenate(parts, self.dim)


@st.composite
def layouts(draw: Callable[..., Any]) -> Layout:
    """A tensor of up to three dimensions that divides over up to four ranks."""
    num_dims = draw(st.integers(1, 3))
    dim = draw(st.integers(0, num_dims - 1))
    chunks = tuple(12 * n for n in draw(st.lists(st.integers(1, 2), min_size=1, max_size=3)))
    shape = [draw(st.integers(1, 4)) for _ in range(num_dims)]
    shape[dim] = sum(chunks)
    return Layout(tuple(shape), dim, chunks)


def even_runs(num_elements: int, dp: int) -> list[tuple[int, int]]:
    """As Nanotron's ZeRO-1 cuts a flattened shard: the first ranks have one element more."""
    sizes = [num_elements // dp + (rank < num_elements % dp) for rank in range(dp)]
    ends = list(itertools.accumulate(sizes, initial=0))
    return list(itertools.pairwise(ends))


def shares_of(
    layout: Layout,
    whole: np.ndarray,
    dtype: Dtype,
    tp: int,
    runs_of: Callable[[int], Sequence[tuple[int, int]] | None],
) -> tuple[list[Share], list[np.ndarray]]:
    """The shares of all ranks and what they hold; without runs the shards themselves."""
    shares, values = [], []
    for rank in range(tp):
        shard = layout.shard(whole, tp, rank).astype(NUMPY[dtype])
        pairs = shard_pairs(layout.shape, split=layout.dim, chunks=layout.chunks, tp=tp, rank=rank)
        for run in runs_of(shard.size) or [None]:
            file = len(shares)
            shares.append(
                Share(
                    name=f"rank {rank} run {run}",
                    file=file,
                    offset_bytes=3 * (file % 3),
                    dtype=dtype,
                    shape=shard.shape,
                    pairs=pairs,
                    whole_shape=layout.shape,
                    run=run,
                )
            )
            values.append(shard.reshape(-1)[slice(*run) if run else slice(None)])
    return shares, values


def file_of(share: Share, values: np.ndarray) -> np.ndarray:
    """The bytes of a file that holds a share."""
    return np.concatenate([np.zeros(share.offset_bytes, np.uint8), values.view(np.uint8)])


def checked(moves: list[Any], wanted: Sequence[Share], sources: Sequence[Path] = ()) -> MovePlan:
    """A plan whose every output is proved to be filled."""
    outputs = [
        OutputFile(
            str(share.file),
            b"\0" * share.offset_bytes,
            share.offset_bytes + share.num_elements * share.dtype.itemsize,
        )
        for share in wanted
    ]
    plan = MovePlan(tuple(sources), tuple(outputs), tuple(moves))
    plan.check()
    return plan


@st.composite
def ways(draw: Callable[..., Any], is_even: bool) -> tuple[Dtype, int, Any]:
    """A dtype, a number of tensor-parallel ranks and how each cuts its flattened shard."""
    dtype, tp = draw(st.sampled_from((Dtype.F16, Dtype.F32))), draw(st.sampled_from((1, 2, 3, 4)))
    dp = draw(st.sampled_from((None, 1, 2, 3, 5)))

    def runs_of(num_elements: int) -> list[tuple[int, int]] | None:
        if dp is None:
            return None
        if is_even:
            return even_runs(num_elements, dp)
        inner = [draw(st.integers(0, num_elements)) for _ in range(dp - 1)]
        return list(itertools.pairwise([0, *sorted(inner), num_elements]))

    return dtype, tp, runs_of


@settings(max_examples=80, deadline=None)
@given(data=st.data(), is_even=st.booleans())
def test_any_topology_becomes_any_other(data: st.DataObject, is_even: bool) -> None:
    layout = data.draw(layouts())
    whole = np.arange(np.prod(layout.shape)).reshape(layout.shape)
    stored = shares_of(layout, whole, *data.draw(ways(is_even)))
    wanted = shares_of(layout, whole, *data.draw(ways(is_even)))
    check_moves(stored, wanted)


def test_ranks_that_cut_their_runs_in_different_rows() -> None:
    layout = Layout((8, 12), 1, (12,))
    whole = np.arange(96).reshape(8, 12)
    cuts = iter([[(0, 15), (15, 48)], [(0, 31), (31, 48)]])
    stored = shares_of(layout, whole, Dtype.F32, 2, lambda num_elements: next(cuts))
    check_moves(stored, shares_of(layout, whole, Dtype.F32, 1, lambda num_elements: None))
    check_moves(stored, shares_of(layout, whole, Dtype.F16, 3, lambda size: even_runs(size, 3)))


def check_moves(
    has: tuple[list[Share], list[np.ndarray]], shall_have: tuple[list[Share], list[np.ndarray]]
) -> None:
    """Plans the moves, proves that they fill what is wanted, and carries them out."""
    (stored, held), (wanted, expected) = has, shall_have
    moves = plan_shards(stored, wanted, place="folder")
    checked(moves, wanted)
    assert sum(move.num_elements for move in moves) == sum(each.size for each in expected)
    sources = [file_of(share, values) for share, values in zip(stored, held, strict=True)]
    filled = [
        file_of(share, values * 0 - 1) for share, values in zip(wanted, expected, strict=True)
    ]
    for move in moves:
        apply_move(move, sources[move.source], filled[move.destination])
    for share, found, values in zip(wanted, filled, expected, strict=True):
        assert found.tobytes() == file_of(share, values).tobytes(), share.name


def test_the_native_engine_moves_runs_between_topologies(tmp_path: Path) -> None:
    layout = Layout((3, 4, 24), 2, (12, 12))
    whole = np.arange(np.prod(layout.shape)).reshape(layout.shape)
    stored, held = shares_of(layout, whole, Dtype.F32, 2, lambda size: even_runs(size, 5))
    wanted, expected = shares_of(layout, whole, Dtype.F32, 3, lambda size: even_runs(size, 2))
    paths = [tmp_path / f"source-{share.file}" for share in stored]
    for path, share, values in zip(paths, stored, held, strict=True):
        path.write_bytes(file_of(share, values).tobytes())
    plan = checked(plan_shards(stored, wanted, place="folder"), wanted, paths)
    engine.execute(plan, tmp_path, workers=1)
    for share, values in zip(wanted, expected, strict=True):
        found = (tmp_path / str(share.file)).read_bytes()
        assert found == file_of(share, values).tobytes()


def test_a_tensor_that_every_rank_has_whole() -> None:
    """A norm's weight with ZeRO-1: any one of its copies is enough, and two of them overlap."""
    pairs = shard_pairs((10,), split=None, chunks=None, tp=2, rank=0)
    norm = Share(
        name="norm",
        file=0,
        offset_bytes=0,
        dtype=Dtype.F32,
        shape=(10,),
        pairs=pairs,
        whole_shape=(10,),
    )
    runs = [replace(norm, name=str(run), run=run) for run in ((0, 4), (4, 4), (4, 10))]
    (first, second) = plan_shards(runs, [norm], place="folder")
    assert (first.num_elements, second.num_elements) == (4, 6)
    assert (first.destination_offset, second.destination_offset) == (0, 16)
    with pytest.raises(UnmovableError, match="the shards in folder overlap"):
        plan_shards([norm, *runs], [norm], place="folder")


LAYOUT = Layout((8, 6), 0, (8,))
WHOLE = np.arange(48).reshape(8, 6)


def rows(tp: int, dtype: Dtype = Dtype.F32) -> list[Share]:
    return shares_of(LAYOUT, WHOLE, dtype, tp, lambda size: None)[0]


def test_tensors_that_are_shared_out_alike_are_planned_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In other files, at other offsets: as if each were planned alone."""
    calls: list[int] = []

    def counted(*args: Any, **choices: Any) -> Any:
        calls.append(1)
        return plan_shards(*args, **choices)

    planner = ShardPlanner()
    monkeypatch.setattr("nanotron_fast.checkpoints.plan.shards.plan_shards", counted)
    stored, wanted = rows(2), rows(4)
    for number in range(3):
        here = [replace(each, file=7 - each.file, offset_bytes=number) for each in stored]
        there = [replace(each, file=each.file + number, offset_bytes=40) for each in wanted]
        expected = plan_shards(here, there, place="here")
        assert planner.plan(here, there, place="here") == expected
        assert planner.plan(there, here, place="here") == plan_shards(there, here, place="here")
    assert len(calls) == 2


def test_shares_that_are_missing() -> None:
    a, b, c, d = rows(4)
    with pytest.raises(
        CheckpointError,
        match=r"^rank 0 run None: the 3 shards in folder hold 12 of the 24 elements that this rank",
    ):
        plan_shards([a, c, d], rows(2), place="folder")
    assert plan_shards([c, d], rows(2)[1:], place="folder")
    # As many elements as are needed, but some of them twice.
    with pytest.raises(CheckpointError, match="hold 24 of the 48 elements"):
        plan_shards([a, a, b, b], rows(1), place="folder")


def test_shares_that_overlap() -> None:
    with pytest.raises(UnmovableError, match="the shards in folder overlap"):
        plan_shards([*rows(2), rows(4)[3]], rows(1), place="folder")


def test_shares_that_contradict_each_other() -> None:
    first, second = rows(2)
    longer = Layout((10, 6), 0, (10,))
    other, _ = shares_of(longer, np.zeros((10, 6)), Dtype.F32, 2, lambda size: None)
    with pytest.raises(
        CheckpointError, match=r"rank 1 .*: it is a shard of a tensor of \[10, 6\], and rank 0 .*8"
    ):
        plan_shards([first, other[1]], rows(1), place="folder")
    beyond = replace(second, run=(20, 25))
    with pytest.raises(
        CheckpointError, match=r"elements 20 to 25 of a shard of \[4, 6\], which has 24"
    ):
        plan_shards([first, beyond], rows(1), place="folder")
    torn = replace(first, shape=(3, 6))
    with pytest.raises(CheckpointError, match=r"of shape \[3, 6\], and .* is not"):
        plan_shards([torn, second], rows(1), place="folder")


def test_what_moves_cannot_say() -> None:
    (whole,) = rows(1)
    everything = (slice(None), slice(None))
    stepping = [SlicesPair(everything, (slice(0, 8, 2), slice(None)))]
    with pytest.raises(UnmovableError, match=r"the slices of rank 0 .* have steps"):
        plan_shards([replace(whole, shape=(4, 6), pairs=stepping)], [whole], place="folder")
    half = [SlicesPair((slice(0, 4), slice(None)), (slice(0, 4), slice(None)))]
    with pytest.raises(UnmovableError, match=r"the slices of rank 0 .* do not make it up"):
        plan_shards(rows(2), [replace(whole, pairs=half)], place="folder")
    with pytest.raises(UnmovableError, match="has 4 dimensions"):
        plan_shards([whole], [replace(whole, shape=(8, 6, 1, 1))], place="folder")
    with pytest.raises(UnmovableError, match=r"rank 0 .* is F32, and F64 in rank 0"):
        plan_shards(rows(2, Dtype.F64), [whole], place="folder")


def test_nothing_wanted_and_nothing_in_it() -> None:
    assert plan_shards(rows(2), [], place="folder") == []
    empty = replace(rows(1)[0], run=(7, 7))
    assert plan_shards(rows(2), [empty], place="folder") == []
