"""SHA-256 of ranges: on their own, and of files while the engine writes them."""

import hashlib
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotron_fast import _C
from nanotron_fast.errors import CheckpointError, PlanError
from nanotron_fast.moves import engine
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.move import Move
from nanotron_fast.moves.plan import MovePlan, OutputFile
from tests.plans import builders, write_sources

MIB = 1 << 20


@pytest.mark.parametrize("level", _C.sha256_levels())
@pytest.mark.parametrize("num_bytes", [0, 1, 55, 56, 63, 64, 65, 119, 120, 4096, 100_003])
def test_sha256_is_that_of_the_standard_library(level, num_bytes):
    data = bytes(i * 7 % 251 for i in range(num_bytes))
    assert _C.sha256(data, level=level) == hashlib.sha256(data).digest()


def test_an_unknown_way_to_hash_is_named():
    with pytest.raises(ValueError, match="'md5': this processor has scalar"):
        _C.sha256(b"", level="md5")


def cuts(draw, size):
    """Ranges of a file, ascending and apart from each other, some of them empty."""
    ends = sorted(draw(st.lists(st.integers(0, size), min_size=2, max_size=8)))
    return [(begin, end - begin) for begin, end in pairwise(ends)]


@settings(deadline=None, max_examples=60)
@given(
    builders(), st.integers(1, 4), st.sampled_from(["buffered", "direct", "dontcache"]), st.data()
)
def test_ranges_are_hashed_while_they_are_written(build, workers, io, data):
    with tempfile.TemporaryDirectory() as folder:
        plan = write_sources(build, Path(folder))
        ranges = {output.path: cuts(data.draw, output.size_bytes) for output in plan.outputs}
        found = {}
        engine.execute(
            plan,
            Path(folder),
            workers=workers,
            io=io,
            hashed=ranges,
            on_digests=lambda output, digests: found.setdefault(output.path, digests),
        )
        for path, wanted in ranges.items():
            written = (Path(folder) / path).read_bytes()
            assert found[path] == [
                hashlib.sha256(written[offset : offset + size]).digest() for offset, size in wanted
            ]


def one_large_file(folder):
    """A tensor that all workers write together, in an order of their own."""
    data = bytes(range(256)) * (6 * MIB // 256)
    (folder / "source").write_bytes(data)
    num_elements = len(data) // 2
    strides = (num_elements, num_elements, 1)
    move = Move(0, 0, 0, 3, (1, 1, num_elements), strides, strides, Dtype.BF16, Dtype.BF16)
    output = OutputFile("out", b"abc", 3 + len(data))
    return MovePlan((folder / "source",), (output,), (move,)), b"abc" + data


@pytest.mark.parametrize("io", ["buffered", "direct", "dontcache"])
def test_many_workers_hash_one_file(tmp_path, io):
    plan, wanted = one_large_file(tmp_path)
    found = []
    refusal = engine.execute(
        plan,
        tmp_path,
        workers=4,
        io=io,
        hashed={"out": [(0, len(wanted))]},
        on_digests=lambda _, digests: found.extend(digests),
    )
    assert (tmp_path / "out").read_bytes() == wanted
    assert found == [hashlib.sha256(wanted).digest()]
    assert io != "buffered" or refusal == ""


def test_ranges_that_overlap_are_refused(tmp_path):
    plan, _ = one_large_file(tmp_path)
    with pytest.raises(PlanError, match="starts at byte 4, and the one before it ends at 5"):
        engine.execute(plan, tmp_path, workers=1, hashed={"out": [(0, 5), (4, 9)]})


def test_digests_of_ranges_of_files(tmp_path):
    contents = [bytes(range(256)) * n for n in (9000, 3)]
    files = [tmp_path / "a", tmp_path / "b"]
    for path, data in zip(files, contents, strict=True):
        path.write_bytes(data)
    ranges = [(0, 0, 9000 * 256), (1, 5, 700), (0, 3, MIB + 1), (1, 768, 0)]
    done = []
    found = engine.digest(files, ranges, workers=3, on_progress=done.append)
    assert found == [
        hashlib.sha256(contents[file][offset : offset + size]).digest()
        for file, offset, size in ranges
    ]
    assert done[-1] == sum(size for _, _, size in ranges)
    with pytest.raises(CheckpointError, match="b: it ends at byte 768"):
        engine.digest(files, [(1, 700, 100)], workers=1)
    with pytest.raises(PlanError, match="file 2 of 2"):
        engine.digest(files, [(2, 0, 1)], workers=1)
    (tmp_path / "b").unlink()
    with pytest.raises(FileNotFoundError, match=r"'.*/b'"):
        engine.digest(files, [(1, 0, 1)], workers=1)
