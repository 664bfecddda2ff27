"""What outlives an error of any kind: files that are whole, and those of earlier runs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast as nf
from nanotron_fast.checkpoints.journal import Journal
from nanotron_fast.checkpoints.processes import PeerFailed, Processes, TorchProcesses
from nanotron_fast.errors import (
    CheckpointError,
    DestinationError,
    PlanError,
    puts_in_doubt,
)
from nanotron_fast.moves import engine
from tests.checkpoints.test_resume import MODEL, TP2, names, stopped


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return MODEL.save(tmp_path / "source")


FAULTS = [
    RuntimeError("a bug"),
    ValueError("a malformed variable"),
    MemoryError(),
    KeyError("x"),
    PeerFailed("process 1 failed"),
]
by_type = [type(each).__name__ for each in FAULTS]


@contextmanager
def failing(number: int, error: BaseException) -> Iterator[None]:
    """The engine raises an error when so many files are whole."""
    execute = engine.execute

    def fail(plan: Any, root: Any, **given: Any) -> None:
        execute(plan.without({each.path for each in plan.outputs[number:]}), root, **given)
        raise error

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, "execute", fail)
        with pytest.raises(type(error)) as caught:
            yield
        assert caught.value is error


def notes_once(error: BaseException) -> str:
    (note,) = error.__notes__
    del error.__notes__
    assert isinstance(note, str)
    return note


@pytest.mark.parametrize("error", FAULTS, ids=by_type)
def test_what_is_whole_outlives_any_fault(
    error: BaseException, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with failing(4, error):
        nf.convert(source, out, topology=TP2)
    assert ", and 4 of " in (note := notes_once(error))
    assert note.endswith("--resume goes on with them, --overwrite-partial begins anew")
    with failing(2, error):
        nf.convert(source, out, topology=TP2, resume=True)
    assert ", and 6 of " in notes_once(error)
    report = nf.convert(source, out, topology=TP2, resume=True)
    assert len(report.part.outputs) == len(report.plan.transfer.outputs) - 6
    assert nf.verify(source, out).equal


@pytest.mark.parametrize("error", FAULTS, ids=by_type)
def test_shares_outlive_a_fault_of_the_run_that_finishes(
    error: BaseException, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for number in (1, 2, 3):
        nf.convert(source, out, topology=TP2, share=(number, 3))
    inodes = {path.stat().st_ino for path in tmp_path.rglob("out*/**/*.safetensors")}
    with failing(0, error):
        nf.convert(source, out, topology=TP2, finish=True)
    assert notes_once(error).endswith(": --finish goes on with them")
    nf.convert(source, out, topology=TP2, finish=True)
    assert {path.stat().st_ino for path in out.rglob("*.safetensors")} == inodes
    assert names(tmp_path) == ["out", "source"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_shares_outlive_an_end_while_they_are_taken_over(
    when: str, source: Path, tmp_path: Path
) -> None:
    """The journal cannot be written; or the device is full just after a file has moved."""
    out = tmp_path / "out"
    for number in (1, 2, 3):
        nf.convert(source, out, topology=TP2, share=(number, 3))
    count = len([*tmp_path.rglob("out.partial-*/content/**/*.safetensors")])
    adopt, calls = Journal.adopt, 0

    def fail(journal: Journal, entries: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == count // 2 and when == "before":
            raise OSError(errno.ENOSPC, "No space left on device")
        adopt(journal, entries)
        if calls == count // 2:
            raise RuntimeError("No space left on device")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Journal, "adopt", fail)
        with pytest.raises((OSError, RuntimeError), match="No space left"):
            nf.convert(source, out, topology=TP2, finish=True)
    assert len([*tmp_path.rglob("out.partial-*/content/**/*.safetensors")]) == count
    nf.convert(source, out, topology=TP2, finish=True)
    assert nf.verify(source, out).equal
    assert names(tmp_path) == ["out", "source"]


class DoubtfulPeer(Processes):
    """Another process that finds that the source has changed, while this one only hears of it."""

    is_in_doubt = True


@pytest.mark.parametrize(
    ("error", "processes"),
    [
        (CheckpointError("model.safetensors: it has changed"), None),
        (PlanError("a move writes twice"), None),
        (PeerFailed("process 1 failed: it has changed"), DoubtfulPeer()),
    ],
    ids=["source", "plan", "peer"],
)
def test_what_is_in_doubt_is_given_up_and_the_rest_stays(
    error: BaseException, processes: Processes | None, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with failing(3, error):
        nf.convert(source, out, topology=TP2, processes=processes)
    assert notes_once(error) == f"what this run wrote is given up; {out} is as it was"
    assert names(tmp_path) == ["source"]
    stopped(source, out, 5)
    inodes = {path.stat().st_ino for path in tmp_path.rglob("out*/**/*.safetensors")}
    with failing(3, error):
        nf.convert(source, out, topology=TP2, resume=True, processes=processes)
    note = notes_once(error)
    assert note.startswith(f"what this run wrote is given up; {out} is as it was, and 5 of ")
    assert "--resume goes on with them where the source is as it was when they were" in note
    left = {path.stat().st_ino for path in tmp_path.rglob("out*/**/*.safetensors")}
    assert left == inodes
    report = nf.convert(source, out, topology=TP2, resume=True)
    assert len(report.part.outputs) == len(report.plan.transfer.outputs) - 5
    assert nf.verify(source, out).equal


def test_nothing_in_doubt_is_a_reason_to_remove_what_was_there(
    source: Path, tmp_path: Path
) -> None:
    """The source changes while a run goes on: what runs before have made is of the old one."""
    out = tmp_path / "out"
    stopped(source, out, 5)
    path = source / "model.safetensors"
    before = path.stat().st_mtime_ns
    execute = engine.execute

    def touch(*args: Any, **given: Any) -> None:
        execute(*args, **given)
        os.utime(path)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, "execute", touch)
        with pytest.raises(CheckpointError, match="it has changed while it was read"):
            nf.convert(source, out, topology=TP2, resume=True)
    with pytest.raises(DestinationError, match=r"5 whole files.*is of another conversion"):
        nf.convert(source, out, topology=TP2, resume=True)
    os.utime(path, ns=(before, before))
    report = nf.convert(source, out, topology=TP2, resume=True)
    assert len(report.part.outputs) == len(report.plan.transfer.outputs) - 5


@pytest.mark.parametrize("error", [CheckpointError("changed"), RuntimeError("a bug")])
def test_the_others_hear_whether_an_error_puts_the_work_in_doubt(error: Exception) -> None:
    class Dist:
        def all_gather_object(self, said: list[Any], own: Any, group: object) -> None:
            said[:] = [own, (str(error), puts_in_doubt(error))]

    processes = object.__new__(TorchProcesses)
    processes.rank, processes.world_size = 0, 2
    processes._dist, processes._group = Dist(), None
    with pytest.raises(PeerFailed, match=f"process 1 failed: {error}"), processes.step():
        pass
    assert processes.is_in_doubt == isinstance(error, CheckpointError)
