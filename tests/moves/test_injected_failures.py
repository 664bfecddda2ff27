"""What the engine does when the system under it fails: every call, every way of carrying bytes."""

import errno
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotron_fast import _C
from nanotron_fast.moves import engine
from nanotron_fast.moves import numpy_engine as reference
from nanotron_fast.moves.row import FILL
from tests.moves.test_hashing import one_large_file
from tests.plans import builders, write_sources

IO = ("buffered", "direct", "dontcache")


@pytest.fixture(autouse=True)
def switched_off():
    yield
    _C.set_failure_point("")


def written(plan, folder, **options):
    engine.execute(plan, Path(folder), **options)
    return {output.path: (Path(folder) / output.path).read_bytes() for output in plan.outputs}


def by_reference(plan):
    return {path: data.tobytes() for path, data in reference.execute_in_memory(plan).items()}


HARMLESS = ("read:odd:EINTR", "write:odd:EINTR", "open:odd:EINTR", "fsync:odd:EINTR",
            "writeback:odd:EINTR", "close:odd:EINTR", "read:1+:short", "write:1+:short",
            "read:1+:half", "write:odd:half")  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(builders(), st.sampled_from(HARMLESS), st.sampled_from(IO), st.booleans())
def test_short_and_interrupted_calls_change_nothing(build, failure, io, fsync):
    with tempfile.TemporaryDirectory() as folder:
        plan = write_sources(build, Path(folder))
        wanted = by_reference(plan)
        _C.set_failure_point(failure)
        try:
            assert written(plan, folder, workers=2, io=io, fsync=fsync) == wanted
            reads = any(move.source != FILL for move in plan.moves)
            happens = {"read": reads, "fsync": fsync, "writeback": fsync}
            if happens.get(failure.partition(":")[0], True):
                assert _C.failure_point_calls() > 0
        finally:
            _C.set_failure_point("")


@pytest.mark.parametrize("io", IO)
@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("call", ["open", "read", "write", "writeback", "fsync", "close"])
def test_an_error_at_any_call_is_one_error_that_names_the_file(tmp_path, call, name, io):
    plan, _ = one_large_file(tmp_path)
    _C.set_failure_point(f"{call}:1000000:{name}")
    engine.execute(plan, tmp_path, workers=1, io=io, fsync=True)
    num_calls = _C.failure_point_calls()
    assert num_calls > 0
    for which in {1, (num_calls + 1) // 2, num_calls}:
        (tmp_path / "out").unlink(missing_ok=True)
        finished = []
        _C.set_failure_point(f"{call}:{which}:{name}")
        with pytest.raises(OSError, match=f"{tmp_path}/(out|source)") as caught:
            engine.execute(
                plan, tmp_path, workers=1, io=io, fsync=True, on_finished=finished.extend
            )
        assert caught.value.errno == getattr(errno, name)
        assert caught.value.filename in (str(tmp_path / "out"), str(tmp_path / "source"))


@pytest.mark.parametrize(
    ("io", "failure", "file", "instead"),
    [
        ("dontcache", "write:1:EOPNOTSUPP:/out", "out", "dropped from the page cache"),
        ("dontcache", "read:1:EINVAL:/source", "source", "dropped from the page cache"),
        ("direct", "open:2:EINVAL:/out", "out", "goes through the page cache"),
        ("direct", "open:3:ENOENT:/source", "source", "goes through the page cache"),
        # The bytes before the first whole page go through the cache in any case.
        ("direct", "write:3:EINVAL:/out", "out", "goes through the page cache"),
        ("direct", "read:1:EOPNOTSUPP:/source", "source", "goes through the page cache"),
    ],
)
def test_what_a_file_system_refuses_is_done_in_another_way(tmp_path, io, failure, file, instead):
    plan, wanted = one_large_file(tmp_path)
    _C.set_failure_point(failure)
    refusal = engine.execute(plan, tmp_path, workers=1, io=io)
    assert (tmp_path / "out").read_bytes() == wanted
    assert refusal.startswith(f"{tmp_path / file}: ")
    assert instead in refusal


@pytest.mark.parametrize("io", ["direct", "dontcache"])
def test_an_error_behind_a_refusal_is_an_error(tmp_path, io):
    plan, _ = one_large_file(tmp_path)
    _C.set_failure_point("write:2+:EDQUOT:/out")
    with pytest.raises(OSError, match=f"{tmp_path}/out") as caught:
        engine.execute(plan, tmp_path, workers=2, io=io)
    assert caught.value.errno == errno.EDQUOT


@pytest.mark.parametrize(
    "text",
    ["write", "write:1", "write:0:EIO", "write:x:EIO", "write:1-:EIO", "write:1:EFOO",
     "seek:1:EIO", "read:1+:EINTR"],
)  # fmt: skip
def test_what_is_no_failure_is_refused(text):
    with pytest.raises(ValueError, match=r"failure point '(write|seek|read)"):
        _C.set_failure_point(text)
