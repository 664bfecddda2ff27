"""The engine against the numpy reference, byte for byte, on random plans."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotron_fast.moves import engine
from nanotron_fast.moves import numpy_engine as reference
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.files import Folder
from nanotron_fast.moves.move import Move
from nanotron_fast.moves.plan import MovePlan, OutputFile
from tests.plans import builders, small_cuts, write_sources

workers = st.integers(1, 4)


def execute(plan, root, workers=2, **options):
    root.mkdir(exist_ok=True)
    engine.execute(plan, root, workers=workers, **options)
    return {output.path: (root / output.path).read_bytes() for output in plan.outputs}


def by_reference(plan):
    return {path: data.tobytes() for path, data in reference.execute_in_memory(plan).items()}


def compare(plan, root, workers=2, **options):
    paths = [root / output.path for output in plan.outputs]
    return engine.compare(plan.sources, paths, plan.moves, workers=workers, **options)


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(builders(), workers, st.booleans())
def test_engine_writes_what_the_reference_writes(build, workers, fsync):
    with tempfile.TemporaryDirectory() as folder:
        plan = write_sources(build, Path(folder))
        plan.check()
        assert execute(plan, Path(folder), workers, fsync=fsync) == by_reference(plan)
        assert compare(plan, Path(folder), workers) == []


@settings(deadline=None, max_examples=40)
@given(builders(), st.integers(1, 5))
def test_shares_write_the_same_bytes(build, world_size):
    with tempfile.TemporaryDirectory() as folder:
        plan = write_sources(build, Path(folder))
        written = {}
        for rank in range(world_size):
            share = execute(plan.share(rank, world_size), Path(folder) / f"rank-{rank}")
            assert not written.keys() & share.keys()
            written |= share
        assert written == by_reference(plan)


@settings(deadline=None, max_examples=60)
@given(
    st.one_of(builders(), builders(aligned=True)),
    st.integers(2, 7),
    st.sampled_from(["buffered", "direct", "dontcache"]),
)
def test_shares_with_cuts_write_the_same_bytes(build, world_size, io):
    with tempfile.TemporaryDirectory() as folder, small_cuts():
        plan = write_sources(build, Path(folder))
        write_shares(plan, Path(folder), world_size, io=io)
        written = {each.path: Path(folder, each.path).read_bytes() for each in plan.outputs}
        assert written == by_reference(plan)


def write_shares(plan, root, world_size, **options):
    """Each share by itself, the last one first; and how many parts of files there were."""
    shares = [plan.share(rank, world_size, cuts=True) for rank in range(world_size)]
    parts = [output for share in shares for output in share.outputs if output.part is not None]
    with Folder.open(root) as content:
        for path, size in {(each.path, each.size_bytes) for each in parts}:
            content.make_hollow(path, size)
    for share in reversed(shares):
        engine.execute(share, root, workers=2, **options)
    return len(parts)


@pytest.mark.parametrize("io", ["buffered", "direct", "dontcache"])
@pytest.mark.parametrize("fsync", [False, True])
def test_parts_of_a_file_that_is_larger_than_blocks_of_devices(io, fsync, tmp_path):
    """Transposed and cast, with edges within pages, beside another that interleaves with it."""
    rows, columns = 1100, 1000
    source = np.random.default_rng(0).standard_normal(rows * columns, np.float32)
    (tmp_path / "source").write_bytes(source.tobytes())
    header = bytes(range(72))
    half = (rows, columns // 2, 1)
    moves = [
        Move(
            0,
            column * rows * 4,
            0,
            len(header) + column * 2,
            half,
            (1, rows, 1),
            (columns, 1, 1),
            Dtype.F32,
            Dtype.BF16,
        )
        for column in (0, columns // 2)
    ]
    output = OutputFile("folder/file", header, len(header) + rows * columns * 2)
    plan = MovePlan((tmp_path / "source",), (output,), tuple(moves))
    plan.check()
    with small_cuts(4096):
        assert write_shares(plan, tmp_path, 5, io=io, fsync=fsync) == 5
    written = (tmp_path / output.path).read_bytes()
    assert written == by_reference(plan)[output.path]


def test_a_part_of_a_file_that_is_not_there(tmp_path):
    output = OutputFile("file", b"12345678", 32, part=(0, 8))
    with pytest.raises(FileNotFoundError, match="file"):
        engine.execute(MovePlan((), (output,), ()), tmp_path, workers=1)
    assert os.listdir(tmp_path) == []


def random_element(move, data):
    """Where one of a move's elements lies in its destination, and in which file."""
    at = [data.draw(st.integers(0, size - 1)) for size in move.sizes]
    elements = sum(i * stride for i, stride in zip(at, move.destination_strides, strict=True))
    return move.destination, move.destination_offset + elements * move.destination_dtype.itemsize


@settings(deadline=None, max_examples=80)
@given(builders(), workers, st.data())
def test_compare_finds_the_moves_that_changed(build, workers, data):
    with tempfile.TemporaryDirectory() as folder:
        plan = write_sources(build, Path(folder))
        execute(plan, Path(folder))
        indices = data.draw(st.sets(st.integers(0, len(plan.moves) - 1)))
        wanted = []
        for index in sorted(indices):
            elements = {random_element(plan.moves[index], data) for _ in range(3)}
            wanted.append((index, len(elements), min(offset for _, offset in elements)))
            for file, offset in elements:
                byte = data.draw(st.integers(0, plan.moves[index].destination_dtype.itemsize - 1))
                with open(Path(folder) / plan.outputs[file].path, "r+b") as stream:
                    stream.seek(offset + byte)
                    old = stream.read(1)[0]
                    stream.seek(offset + byte)
                    stream.write(bytes([old ^ data.draw(st.integers(1, 255))]))
        assert compare(plan, Path(folder), workers) == wanted
