"""The engine against the numpy reference, byte for byte, on random plans."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotron_fast.moves import engine
from nanotron_fast.moves import numpy_engine as reference
from tests.plans import builders, write_sources

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
