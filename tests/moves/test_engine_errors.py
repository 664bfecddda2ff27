"""What the engine refuses, how it reports a failing disk, and how it is stopped."""

import array
import errno
import os
import resource
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nanotron_fast import _C
from nanotron_fast.errors import Cancelled, CheckpointError, PlanError
from nanotron_fast.moves import engine
from nanotron_fast.moves.dtypes import Dtype
from nanotron_fast.moves.files import FileState, Folder
from nanotron_fast.moves.move import Move, table_of
from nanotron_fast.moves.plan import MovePlan, OutputFile

MOVE = Move(0, 2, 0, 4, (2, 3, 2), (6, 2, 1), (6, 2, 1), Dtype.F32, Dtype.BF16)
SOURCE_BYTES = 2 + 48


@pytest.fixture
def plan(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(bytes(range(SOURCE_BYTES)))
    return MovePlan((source,), (OutputFile("out/put", b"head", 4 + 24),), (MOVE,))


def execute_table(plan, root, table, progress=None):
    (root / "out").mkdir(exist_ok=True)
    outputs = [(str(root / o.path), [(0, o.header)], o.size_bytes) for o in plan.outputs]
    sources = [(str(path), None) for path in plan.sources]
    progress = progress or _C.Progress()
    with Folder.open(root) as folder:
        place = folder.descriptor, str(root)
        _C.execute(sources, place, outputs, table, workers=2, fsync=False, progress=progress)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": 1}, "move 0: source file 1 is not one of 1"),
        ({"source": -2}, "move 0: source file -2 is not one of 1"),
        ({"destination": 3}, "move 0: destination file 3 is not one of 1"),
        ({"destination": -1}, "move 0: destination file -1 is not one of 1"),
        ({"source_offset": -2}, "move 0: source offset is negative"),
        ({"destination_offset": -4}, "move 0: destination offset is negative"),
        ({"source_offset": 3}, "move 0: source ends at byte 51 of a file of 50"),
        ({"destination_offset": 6}, "move 0: destination ends at byte 30 of a file of 28"),
        ({"sizes": (2, 3, 3)}, "move 0: source ends at byte 54 of a file of 50"),
        ({"sizes": (2, 0, 2)}, "move 0: size 0"),
        ({"sizes": (2**62, 2, 2)}, "move 0: size 2"),
        ({"source_strides": (0, 2, 1)}, "move 0: source stride 0 is not positive"),
        ({"destination_strides": (6, -2, 1)}, "move 0: destination stride -2 is not positive"),
        ({"source_strides": (2**62, 2**62, 2**62)}, "move 0: its extent overflows"),
        ({"source_dtype": 7}, "move 0: unknown dtype code 7"),
        ({"destination_dtype": -1}, "move 0: unknown dtype code -1"),
        ({"destination_dtype": Dtype.F64}, "a file of 28"),
    ],
)
def test_moves_are_validated(plan, tmp_path, changes, message):
    table = table_of([replace(MOVE, **changes)])
    with pytest.raises(PlanError, match=message):
        execute_table(plan, tmp_path, table)
    assert not (tmp_path / "out/put").exists()


def test_unknown_cast(plan, tmp_path):
    move = replace(MOVE, sizes=(1, 2, 1), destination_dtype=Dtype.F64)
    with pytest.raises(PlanError, match="move 0: no cast between its dtypes"):
        execute_table(plan, tmp_path, table_of([move]))


@pytest.mark.parametrize(
    "table",
    [
        array.array("q", range(15)),
        array.array("q", range(33)),
        array.array("i", range(16)),
        array.array("d", range(16)),
        np.zeros((16, 2), np.int64),
        np.zeros((2, 32), np.int64)[:, ::2],
        np.zeros(32, np.int64)[::2],
        np.zeros(16, np.uint64),
        np.zeros(16, ">i8"),
    ],
    ids=lambda table: f"{getattr(table, 'dtype', table)}-{getattr(table, 'shape', '')}",
)
def test_tables_are_validated(plan, tmp_path, table):
    with pytest.raises(PlanError, match="contiguous int64 with 16 columns"):
        execute_table(plan, tmp_path, table)


def test_a_table_may_be_an_array_of_rows(plan, tmp_path):
    table = np.array(table_of([MOVE]), np.int64).reshape(1, 16)
    execute_table(plan, tmp_path, table)
    assert (tmp_path / "out/put").stat().st_size == 28


@pytest.mark.parametrize("is_link", [False, True])
def test_a_file_that_was_there_is_left_alone(plan, tmp_path, is_link):
    (tmp_path / "out").mkdir()
    there = tmp_path / ("elsewhere" if is_link else "out/put")
    there.write_bytes(bytes(1000))
    if is_link:
        (tmp_path / "out/put").symlink_to(there)
    with pytest.raises(FileExistsError) as caught:
        engine.execute(plan, tmp_path, workers=1)
    assert caught.value.filename == str(tmp_path / "out/put")
    assert there.read_bytes() == bytes(1000)


def test_a_folder_that_is_held_open_is_the_one_that_is_written_to(plan, tmp_path):
    (tmp_path / "held").mkdir()
    with Folder.open(tmp_path / "held") as held:
        (tmp_path / "held").rename(tmp_path / "moved")
        (tmp_path / "held").mkdir()
        engine.execute(plan, held, workers=1)
    assert (tmp_path / "moved/out/put").stat().st_size == 28
    assert not list((tmp_path / "held").iterdir())


def test_whole_files_are_reported_as_they_come(plan, tmp_path):
    second = replace(plan.outputs[0], path="out/second")
    moves = (MOVE, replace(MOVE, destination=1))
    both = replace(plan, outputs=(*plan.outputs, second), moves=moves)
    finished = []
    engine.execute(both, tmp_path, workers=2, on_finished=finished.extend)
    assert sorted(output.path for output in finished) == ["out/put", "out/second"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(bytes(60)), "it had 50 bytes when the plan was made, .* 60"),
        (lambda path: os.utime(path, ns=(1, 1)), "it was written to since the plan was made"),
        (
            lambda path: (path.rename(f"{path}.old"), path.write_bytes(bytes(50))),
            "another file has taken its place",
        ),
    ],
    ids=["size", "time", "inode"],
)
def test_a_source_that_has_changed_is_refused(plan, tmp_path, change, message):
    source = plan.sources[0]
    states = {source: FileState.of(source.stat())}
    change(source)
    with pytest.raises(CheckpointError, match=f"source: {message}"):
        engine.execute(plan, tmp_path, workers=1, states=states)


def test_literals_lie_between_what_moves_write(plan, tmp_path):
    output = replace(plan.outputs[0], size_bytes=32, literals=((28, b"tail"),))
    whole = replace(plan, outputs=(output,))
    whole.check()
    engine.execute(whole, tmp_path, workers=1)
    assert (tmp_path / "out/put").read_bytes()[28:] == b"tail"
    for offset, message in ((27, "written twice"), (29, "nothing writes byte 28")):
        bad = replace(output, size_bytes=offset + 4, literals=((offset, b"tail"),))
        with pytest.raises(PlanError, match=message):
            replace(plan, outputs=(bad,)).check()


def test_files_of_a_header_alone(tmp_path):
    plan = MovePlan((), (OutputFile("a/b", b"header", 6), OutputFile("c", b"", 0)), ())
    engine.execute(plan, tmp_path, workers=3, fsync=True)
    assert (tmp_path / "a/b").read_bytes() == b"header"
    assert (tmp_path / "c").read_bytes() == b""
    engine.execute(MovePlan((), (), ()), tmp_path, workers=1)


def test_names_that_are_not_unicode(plan, tmp_path):
    name = os.fsdecode(b"caf\xe9")
    source = plan.sources[0].rename(tmp_path / name)
    plan = replace(plan, sources=(source,), outputs=(replace(plan.outputs[0], path=name * 2),))
    engine.execute(plan, tmp_path, workers=1)
    assert engine.compare(plan.sources, [tmp_path / (name * 2)], plan.moves, workers=1) == []
    (tmp_path / (name * 2)).unlink()
    with pytest.raises(PlanError, match=f"{name}: the plan left 28 of 30"):
        engine.execute(
            replace(plan, outputs=(replace(plan.outputs[0], size_bytes=30),)), tmp_path, workers=1
        )
    source.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        engine.execute(plan, tmp_path, workers=1)
    assert caught.value.filename == str(source)


def test_an_output_that_the_plan_leaves_short(plan, tmp_path):
    short = replace(plan, outputs=(replace(plan.outputs[0], size_bytes=30),))
    with pytest.raises(PlanError, match="out/put: the plan left 28 of 30 bytes"):
        engine.execute(short, tmp_path, workers=1)
    (tmp_path / "out/put").unlink()
    empty = replace(short, moves=())
    with pytest.raises(PlanError, match="out/put: the plan left 4 of 30 bytes"):
        engine.execute(empty, tmp_path, workers=1)


def test_a_source_that_is_shorter_than_planned(plan, tmp_path):
    os.truncate(plan.sources[0], 20)
    with pytest.raises(PlanError, match="source ends at byte 50 of a file of 20"):
        engine.execute(plan, tmp_path, workers=1)


def failure(kind, number, path, work):
    with pytest.raises(kind) as caught:
        work()
    assert caught.value.errno == number
    assert caught.value.filename == str(path)


def test_io_errors_carry_errno_and_filename(plan, tmp_path):
    def run():
        engine.execute(plan, tmp_path, workers=2)

    source = plan.sources[0]
    saved = source.rename(tmp_path / "saved")
    failure(FileNotFoundError, errno.ENOENT, source, run)
    source.mkdir()
    with pytest.raises((IsADirectoryError, PlanError)):  # the size of a folder varies
        run()
    source.rmdir()
    saved.rename(source)
    (tmp_path / "out/put").mkdir()
    failure(FileExistsError, errno.EEXIST, tmp_path / "out/put", run)
    missing = tmp_path / "missing"
    failure(
        FileNotFoundError,
        errno.ENOENT,
        missing,
        lambda: engine.compare(plan.sources, [missing], plan.moves, workers=1),
    )


def test_a_folder_that_is_not_there(plan, tmp_path):
    path = str(tmp_path / "nowhere/put")
    outputs = [("nowhere/put", [(0, b"head")], 28)]
    folder = Folder.open(tmp_path)
    failure(
        FileNotFoundError,
        errno.ENOENT,
        path,
        lambda: _C.execute(
            [(str(plan.sources[0]), None)],
            (folder.descriptor, str(tmp_path)),
            outputs,
            table_of(plan.moves),
            workers=1,
            fsync=False,
            progress=_C.Progress(),
        ),
    )


def test_a_full_disk(plan, tmp_path):
    """As far as a limit on the size of files is like one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        failure(
            OSError,
            errno.EFBIG,
            tmp_path / "out/put",
            lambda: engine.execute(plan, tmp_path, workers=2),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_workers_must_be_positive(plan, tmp_path):
    with pytest.raises(ValueError, match="workers must be at least 1"):
        engine.execute(plan, tmp_path, workers=0)


def test_cancel(plan, tmp_path):
    progress = _C.Progress()
    progress.cancel()
    with pytest.raises(Cancelled):
        execute_table(plan, tmp_path, table_of(plan.moves), progress)
    assert progress.bytes_done == 0


@pytest.fixture
def endless(tmp_path, monkeypatch):
    """Compares two sparse files so large that it takes minutes; checks that it came to an end."""
    num_bytes = 2**38
    paths = [tmp_path / "one", tmp_path / "two"]
    for path in paths:
        path.touch()
        try:
            os.truncate(path, num_bytes)
        except OSError:
            pytest.skip("this file system holds no sparse files")
    line = (num_bytes // 2, 1, 1)
    move = Move(0, 0, 0, 0, line, (1, 1, 1), (1, 1, 1), Dtype.BF16, Dtype.BF16)
    ended, compare = [], _C.compare

    def noted(*args, **options):
        try:
            return compare(*args, **options)
        finally:
            ended.append(True)

    def run(**options):
        try:
            engine.compare(paths[:1], paths[1:], [move], workers=2, **options)
        finally:
            assert ended == [True]

    monkeypatch.setattr(_C, "compare", noted)
    return run


def test_the_keyboard_stops_the_workers(endless):
    timer = threading.Timer(0.25, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        endless()
    timer.join()


def test_an_error_in_the_callback_stops_the_workers(endless):
    calls = []

    def fail(bytes_done):
        calls.append(bytes_done)
        if len(calls) == 3:
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        endless(on_progress=fail)
    assert calls == sorted(calls)
    assert calls[-1] > 0


@pytest.mark.parametrize("fsync", [False, True])
def test_files_are_not_synced_once_cancelled(fsync: bool, tmp_path: Path) -> None:
    """A file without tensors: there is no block before which the engine would have looked."""
    progress = _C.Progress()
    progress.cancel()
    path = tmp_path / "out"
    folder = Folder.open(tmp_path)

    def execute() -> None:
        path.unlink(missing_ok=True)
        _C.execute(
            [],
            (folder.descriptor, bytes(tmp_path)),
            [(b"out", [(0, b"header")], 6)],
            table_of(()),
            workers=1,
            fsync=fsync,
            progress=progress,
        )

    if fsync:
        with pytest.raises(Cancelled):
            execute()
    else:
        execute()
    assert path.read_bytes() == b"header"
