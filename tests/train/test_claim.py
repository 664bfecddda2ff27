"""Two runs in one folder: the second is refused while the first lives."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from nanotron_fast.checkpoints.owners import Owner
from nanotron_fast.checkpoints.ownership import Lock
from nanotron_fast.errors import CheckpointError, ConfigError, DestinationError
from nanotron_fast.train import checkpoint as saving
from nanotron_fast.train import claim as claiming
from nanotron_fast.train import run as running
from nanotron_fast.train import trainer
from nanotron_fast.train.claim import LOCK, claim
from nanotron_fast.train.metrics import read_metrics
from tests.train.runs import train

RESUME = "checkpoints__resume_checkpoint_path"


def of_another_machine(root: Path) -> Path:
    """A lock that was touched just now."""
    owner = replace(Owner.this("0a1b2c3d"), host="node7", boot="another", pid=4711)
    root.mkdir(exist_ok=True)
    (root / LOCK).write_text(json.dumps(asdict(owner)))
    return root / LOCK


def partial_of(root: Path) -> Path:
    partial = root / ".3.0a1b2c3d.partial"
    (partial / "model").mkdir(parents=True)
    return partial


def test_a_second_run_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    lock = claim(tmp_path)
    partial = partial_of(tmp_path)
    with pytest.raises(
        ConfigError,
        match=rf"checkpoints_path is {tmp_path}, and another run is writing to it: "
        rf"process {os.getpid()} on .*: wait for its end, or give another folder",
    ):
        train(tmp_path, tokens__train_steps=1)
    assert sorted(os.listdir(tmp_path)) == sorted([partial.name, LOCK])
    lock.release()
    assert train(tmp_path, tokens__train_steps=1).step == 1
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("is_resumed", [False, True])
def test_what_another_run_has_saved_meanwhile_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_resumed: bool
) -> None:
    """It was writing when this one looked for where to begin, and has ended before the claim."""
    changes = {RESUME: str(tmp_path)} if is_resumed else {}
    inner = trainer.claim_room

    def claiming(*given: Any) -> Lock | None:
        monkeypatch.setattr(trainer, "claim_room", inner)
        train(tmp_path, tokens__train_steps=2, **changes)
        return inner(*given)

    monkeypatch.setattr(trainer, "claim_room", claiming)
    told = (
        rf"another run has saved to {tmp_path} while this one began: it would go on after step 2 "
        "now, and not after step 0; start it again"
        if is_resumed
        else "has the checkpoints of a run already"
    )
    with pytest.raises((CheckpointError, ConfigError), match=told):
        train(tmp_path, tokens__train_steps=3, **changes)
    assert sorted(os.listdir(tmp_path)) == ["2", "latest.txt", "metrics.jsonl"]
    assert train(tmp_path, **{**changes, RESUME: str(tmp_path)}, tokens__train_steps=3).step == 3


def test_a_run_that_this_one_goes_on_from_may_live_and_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes to another folder."""
    old, inner = tmp_path / "old", trainer.claim_room
    train(old, tokens__train_steps=1)

    def claiming(*given: Any) -> Lock | None:
        monkeypatch.setattr(trainer, "claim_room", inner)
        train(old, tokens__train_steps=2, **{RESUME: str(old)})
        return inner(*given)

    monkeypatch.setattr(trainer, "claim_room", claiming)
    assert train(tmp_path / "new", tokens__train_steps=3, **{RESUME: str(old)}).step == 3


def test_a_run_that_has_no_step_to_take_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs no claim, so another may be writing."""
    inner = running.Run._step

    def stepping(run: Any, number: int, batch: Any) -> Any:
        if number == 4:
            run.saver.finished()
            assert train(tmp_path, tokens__train_steps=2, **{RESUME: str(tmp_path)}).step == 2
        return inner(run, number, batch)

    monkeypatch.setattr(running.Run, "_step", stepping)
    train(tmp_path, tokens__train_steps=5, checkpoints__checkpoint_interval=2)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_run_that_was_killed_here_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is its lock watched."""
    pid = os.fork()
    if pid == 0:
        claim(tmp_path)
        partial_of(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / LOCK).exists()
    monkeypatch.setattr(claiming, "time", None)
    claim(tmp_path).release()
    assert os.listdir(tmp_path) == []


def touch(lock: Path) -> None:
    os.utime(lock)


def grow_old(lock: Path) -> None:
    os.utime(lock, (time.time() - 31, time.time() - 31))


@pytest.mark.parametrize(("becomes", "is_alive"), [(touch, True), (grow_old, False)])
def test_a_run_of_another_machine_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, becomes: Callable[[Path], None], is_alive: bool
) -> None:
    """Its job may have been sent off again, here, seconds after it was killed there."""
    lock = of_another_machine(tmp_path)
    partial = partial_of(tmp_path)
    time.sleep(0.01)
    monkeypatch.setattr(claiming.time, "sleep", lambda _: becomes(lock))
    if is_alive:
        with pytest.raises(DestinationError, match="another run is writing to it: process 4711 on"):
            claim(tmp_path)
        assert partial.is_dir()
    else:
        claim(tmp_path).release()
        assert os.listdir(tmp_path) == []


def test_a_lock_that_is_none(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(ConfigError, match=rf"can be written: Is a directory: {tmp_path}/{LOCK}$"):
        train(tmp_path, tokens__train_steps=1)
    assert os.listdir(tmp_path) == [LOCK]


def test_a_lock_that_cannot_be_given_up_ends_no_run_that_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk of a network that fails."""
    inner = Lock.release

    def fails(lock: Lock) -> None:
        inner(lock)
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(lock.path))

    monkeypatch.setattr(Lock, "release", fails)
    assert train(tmp_path, tokens__train_steps=1).step == 1


def test_a_disk_that_a_killed_run_has_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = partial_of(tmp_path)
    inner = Lock.acquire

    def acquire(lock: Lock) -> None:
        if partial.exists() or (tmp_path / "full").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(lock.path))
        inner(lock)

    monkeypatch.setattr(Lock, "acquire", acquire)
    claim(tmp_path).release()
    assert os.listdir(tmp_path) == []
    (tmp_path / "full").touch()
    with pytest.raises(OSError, match="No space left"):
        claim(tmp_path)


def test_a_run_that_has_lost_its_folder_ends_without_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a machine that was halted, which another takes for dead."""
    inner = running.Run._step

    def stepping(run: Any, number: int, batch: Any) -> Any:
        if number == 3:
            run.saver.finished()
            of_another_machine(tmp_path)
        return inner(run, number, batch)

    monkeypatch.setattr(running.Run, "_step", stepping)
    with pytest.raises(DestinationError, match=r"this run has it no more: process 4711 on node7"):
        train(tmp_path, tokens__train_steps=6, checkpoints__checkpoint_interval=2)
    assert (tmp_path / "latest.txt").read_text() == "2"
    assert not (tmp_path / "4").exists()
    assert [path.name for path in tmp_path.glob(".*")] == [LOCK]


def test_what_others_have_removed_is_not_made_anew_without_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = saving._write_document

    def writing(path: Path, contents: Any, *, fsync: bool) -> None:
        (partial,) = tmp_path.glob(".*.partial")
        shutil.rmtree(partial / "model")
        partial.rename(tmp_path / "elsewhere")
        inner(path, contents, fsync=fsync)

    monkeypatch.setattr(saving, "_write_document", writing)
    with pytest.raises(FileNotFoundError):
        train(tmp_path, tokens__train_steps=1)
    assert not (tmp_path / "1").exists()
