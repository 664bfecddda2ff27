"""Runs that go on where others ended: killed at any moment, out of room, one share of several."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast as nf
from nanotron_fast.checkpoints import checking, fingerprint, owners
from nanotron_fast.checkpoints.owners import Owner
from nanotron_fast.checkpoints.processes import Processes
from nanotron_fast.errors import (
    CheckpointError,
    DestinationError,
)
from nanotron_fast.moves import engine
from tests.checkpoints.kill_loop import tree
from tests.modelzoo import make

MODEL = make("llama", num_hidden_layers=2)
TP2 = nf.Topology(tp=2)
ROOT = Path(__file__).resolve().parents[2]
KILL_LOOP = Path(__file__).with_name("kill_loop.py")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return MODEL.save(tmp_path / "source")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def stopped(source: Path, out: Path, number: int, **options: Any) -> None:
    """A run that ends with an error when so many files are whole."""
    execute = engine.execute
    count = 0

    def fail(plan: Any, root: Any, **given: Any) -> None:
        nonlocal count
        part = plan.without({each.path for each in plan.outputs[number:]})
        execute(part, root, **given)
        raise OSError(errno.EDQUOT, "Disk quota exceeded", plan.outputs[number].path)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, "execute", fail)
        with pytest.raises(OSError, match="Disk quota exceeded") as caught:
            nf.convert(source, out, topology=TP2, **options)
    if number:
        (note,) = caught.value.__notes__
        assert "files are whole in" in note
        assert "--resume goes on with them" in note
    else:
        assert not hasattr(caught.value, "__notes__")


def test_killed_at_any_moment(tmp_path: Path) -> None:
    (tmp_path / "rounds").mkdir()
    # Of a size that several processes cut.
    source = make("llama", num_hidden_layers=1, vocab_size=1000).save(tmp_path / "source")
    seed = random.randrange(10**6)
    result = subprocess.run(
        [sys.executable, KILL_LOOP, source, tmp_path / "rounds", str(seed), "150"],
        capture_output=True,
        text=True,
        check=False,
        # The repository last: its kernels/ would shadow another package.
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)])},
    )
    assert result.returncode == 0, f"seed {seed}: {result.stderr}"
    assert "kills" in result.stdout


def test_what_is_whole_is_not_written_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(source, out, 0)
    assert names(tmp_path) == ["source"]
    stopped(source, out, 9)
    partial, _ = names(tmp_path)
    inodes = {path.stat().st_ino for path in (tmp_path / partial).rglob("*.safetensors")}
    assert len(inodes) == 9
    with pytest.raises(DestinationError, match=r"\(9 whole files, begun \d+ seconds ago\)"):
        nf.convert(source, out, topology=TP2)
    report = nf.convert(source, out, topology=TP2, resume=True)
    assert len(report.part.outputs) == len(report.plan.transfer.outputs) - 9
    assert inodes < {path.stat().st_ino for path in out.rglob("*.safetensors")}
    assert nf.verify(source, out).equal
    assert names(tmp_path) == ["out", "source"]


def test_several_runs_in_a_row(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(source, out, 5)
    stopped(source, out, 5, resume=True)
    stopped(source, out, 3, resume=True)
    report = nf.convert(source, out, topology=TP2, resume=True)
    assert len(report.part.outputs) == len(report.plan.transfer.outputs) - 13
    nf.convert(source, tmp_path / "wanted", topology=TP2)
    assert tree(out) == tree(tmp_path / "wanted")


def test_nothing_to_resume_is_a_beginning(source: Path, tmp_path: Path) -> None:
    nf.convert(source, tmp_path / "out", resume=True)
    assert nf.verify(source, tmp_path / "out").equal


def test_what_differs_is_given_up_and_the_rest_gone_on_with(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(source, out, 5)
    (fitting, _) = names(tmp_path)
    (tmp_path / fitting).rename(tmp_path / "aside")
    stopped(source, out, 3, dtype="fp16")
    (tmp_path / "aside").rename(tmp_path / fitting)
    report = nf.convert(source, out, topology=TP2, resume=True, overwrite_partial=True)
    assert len(report.part.outputs) == len(report.plan.transfer.outputs) - 5
    assert names(tmp_path) == ["out", "source"]


def test_beginning_anew(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(source, out, 5)
    report = nf.convert(source, out, topology=TP2, overwrite_partial=True)
    assert report.part == report.plan.transfer
    assert names(tmp_path) == ["out", "source"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda source: {"topology": nf.Topology(tp=4)}, "tp is 4 now, and 2 then"),
        (lambda source: {"topology": nf.Topology(tp=2, pp=2)}, "pp is 2 now, and 1 then"),
        (lambda source: {"topology": TP2, "dtype": "fp16"}, "dtype is fp16 now, and"),
        (
            lambda source: os.utime(source / "model.safetensors") or {"topology": TP2},
            "model.safetensors was written at .* now, and at .* then",
        ),
    ],
    ids=["tp", "pp", "dtype", "source"],
)
def test_another_conversion_is_not_gone_on_with(
    change: Any, message: str, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stopped(source, out, 5)
    before = tree(tmp_path)
    options = change(source)
    with pytest.raises(DestinationError, match=f"is of another conversion: .*{message}"):
        nf.convert(source, out, resume=True, **options)
    assert tree(tmp_path) == before
    nf.convert(source, out, resume=True, overwrite_partial=True, **options)
    assert names(tmp_path) == ["out", "source"]


@pytest.mark.parametrize("damage", ["shorter", "gone", "no journal", "half a line"])
def test_damaged_leftovers(damage: str, source: Path, tmp_path: Path) -> None:
    """What is not sure to be whole is written again."""
    out = tmp_path / "out"
    stopped(source, out, 5)
    partial = tmp_path / names(tmp_path)[0]
    path = next(partial.rglob("*.safetensors"))
    journal = partial / "journal-0"
    if damage == "shorter":
        os.truncate(path, 100)
    elif damage == "gone":
        path.unlink()
    elif damage == "no journal":
        journal.write_text("")
    else:
        journal.write_bytes(journal.read_bytes()[:-9])
    report = nf.convert(source, out, topology=TP2, resume=True)
    missing = 5 if damage == "no journal" else 1
    assert len(report.part.outputs) == len(report.plan.transfer.outputs) - 5 + missing
    assert nf.verify(source, out).equal
    assert names(tmp_path) == ["out", "source"]


def test_a_journal_names_nothing_outside(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "precious").write_text("precious")
    stopped(source, out, 5)
    partial = tmp_path / next(name for name in names(tmp_path) if "partial" in name)
    with open(partial / "journal-0", "a") as journal:
        for name in ("../../precious", str(tmp_path / "precious"), "model", "\x00"):
            entry = {"file": name, "size": 8, "synced": True, "boot": ""}
            journal.write(json.dumps(entry) + "\n")
        journal.write('[1]\n"x"\n{"file": 3, "size": "8"}\n{"file": [], "size": null}\n')
    nf.convert(source, out, topology=TP2, resume=True)
    assert (tmp_path / "precious").read_text() == "precious"
    assert nf.verify(source, out).equal


def test_what_was_not_synced_before_a_crash_is_written_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine was started anew: what it had in memory is gone."""
    stopped(source, tmp_path / "a", 5)
    stopped(source, tmp_path / "b", 5, fsync=True)
    for module in ("owners", "journal", "checking"):
        monkeypatch.setattr(f"nanotron_fast.checkpoints.{module}.boot_id", lambda: "another")
    for name, whole in (("a", 0), ("b", 5)):
        report = nf.convert(source, tmp_path / name, topology=TP2, resume=True)
        assert len(report.part.outputs) == len(report.plan.transfer.outputs) - whole


def test_a_source_that_is_written_to_meanwhile(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it was read, too: what was written may be a mixture."""
    execute = engine.execute

    def touch(*args: Any, **given: Any) -> None:
        execute(*args, **given)
        os.utime(source / "model.safetensors")

    monkeypatch.setattr(engine, "execute", touch)
    with pytest.raises(CheckpointError, match=r"model.safetensors: it has changed while it was re"):
        nf.convert(source, tmp_path / "out")
    assert names(tmp_path) == ["source"]


def test_an_output_that_changes_before_the_end(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = engine.execute

    def truncate(plan: Any, root: Any, **given: Any) -> None:
        execute(plan, root, **given)
        os.truncate(root.path / plan.outputs[3].path, 10)

    monkeypatch.setattr(engine, "execute", truncate)
    with pytest.raises(DestinationError, match=r"it has 10 bytes, and .* were written"):
        nf.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_swapped(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = engine.execute

    def swap(plan: Any, root: Any, **given: Any) -> None:
        execute(plan, root, **given)
        root.path.rename(tmp_path / "stolen")
        root.path.mkdir()

    monkeypatch.setattr(engine, "execute", swap)
    with pytest.raises(DestinationError, match="is not the folder any more that was written to"):
        nf.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def elsewhere(path: Path, silent_seconds: float) -> None:
    """A lock as a process of another machine has it, which was heard of so long ago."""
    owner = {
        "run": "0a1b2c3d",
        "host": "node7",
        "boot": "b",
        "namespace": "n",
        "pid": 1,
        "ticks": 1,
        "since": 1.7e9,
    }
    path.write_text(json.dumps(owner))
    now = path.stat().st_mtime
    os.utime(path, (now - silent_seconds, now - silent_seconds))


def test_locks_of_other_machines(source: Path, tmp_path: Path) -> None:
    lock = tmp_path / ".out.nanotron_fast.lock"
    elsewhere(lock, 10)
    with pytest.raises(DestinationError, match="process 1 on node7, since 2023"):
        nf.convert(source, tmp_path / "out")
    elsewhere(lock, owners.DEAD_AFTER_SECONDS + 1)
    nf.convert(source, tmp_path / "out")
    assert names(tmp_path) == ["out", "source"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"run": 3}', "x" * 100])
def test_locks_that_cannot_be_read(text: str, source: Path, tmp_path: Path) -> None:
    lock = tmp_path / ".out.nanotron_fast.lock"
    lock.write_text(text)
    with pytest.raises(DestinationError, match=rf"by whom cannot be read from {lock}, .* 30 s"):
        nf.convert(source, tmp_path / "out")
    os.utime(lock, (1, 1))
    nf.convert(source, tmp_path / "out")
    assert names(tmp_path) == ["out", "source"]


def test_a_process_number_that_is_used_again() -> None:
    """The number lives, and the process is another."""
    owner = Owner.this("0a1b2c3d")
    assert owner.is_alive(10**6)
    again = Owner(**{each: getattr(owner, each) for each in Owner.__slots__} | {"ticks": 1})
    assert not again.is_alive(0)


def test_a_lock_that_is_taken_from_a_silent_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped for so long that it passed for dead: it ends, and changes nothing."""
    execute = engine.execute

    def take(*args: Any, **given: Any) -> None:
        execute(*args, **given)
        lock = tmp_path / ".out.nanotron_fast.lock"
        lock.unlink()
        elsewhere(lock, 0)

    monkeypatch.setattr(engine, "execute", take)
    with pytest.raises(DestinationError, match="another conversion has taken the lock"):
        nf.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.nanotron_fast.lock").exists()


def test_what_was_replaced_and_cannot_be_removed_is_a_warning(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    nf.convert(source, out)

    def fail(path: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr("nanotron_fast.checkpoints.destination.remove", fail)
    report = nf.convert(source, out, topology=TP2, overwrite=True)
    (warning,) = report.warnings
    assert "cannot be removed, and is not needed: Operation not permitted" in warning
    assert nf.inspect(out).topology == TP2
    monkeypatch.undo()
    nf.convert(source, out, overwrite=True)
    assert names(tmp_path) == ["out", "source"]


def test_processes_that_see_different_things(source: Path, tmp_path: Path) -> None:
    """As through a mount that shows an older state on one machine."""
    plan = nf.plan(source, tmp_path / "out")
    states = fingerprint.states_of(plan)
    made = fingerprint.made_by(plan, states)
    path = source / "model.safetensors"
    other = {**states, path: replace(states[path], header_digest="x")}
    other[path] = replace(other[path], state=states[path].state._replace(mtime_ns=7))

    class Two(Processes):
        world_size = 2

        def gather(self, value: Any) -> list[Any]:
            if isinstance(value, tuple):
                return [value, (fingerprint.made_by(plan, other).digest, value[1])]
            return [value, fingerprint.made_by(plan, other)]

    message = "do not see the same: .*model.safetensors was written at .* in process 0, and at .* 1"
    with pytest.raises(CheckpointError, match=message):
        checking.check_same(Two(), made)


@pytest.mark.parametrize("name", ["journal-2024.txt", "journal-", "journal-1x"])
def test_a_folder_that_only_looks_like_a_run_s(name: str, source: Path, tmp_path: Path) -> None:
    precious = tmp_path / "out.partial-12345678" / name
    precious.parent.mkdir()
    precious.write_text("precious")
    nf.convert(source, tmp_path / "out", overwrite_partial=True)
    assert precious.read_text() == "precious"


@pytest.mark.parametrize(("src", "dst"), [("file://{}", "{}"), ("{}", "file://{}")])
def test_a_url_of_a_folder_is_that_folder(src: str, dst: str, source: Path, tmp_path: Path) -> None:
    before = tree(source)
    with pytest.raises(DestinationError, match="the destination is the source"):
        nf.convert(src.format(source), dst.format(source), overwrite=True)
    with pytest.raises(DestinationError, match="the destination lies inside"):
        nf.convert(src.format(source), dst.format(source / "sub"))
    assert tree(source) == before
    nf.convert(src.format(source), dst.format(tmp_path / "out"))
    assert nf.verify(f"file://{source}", tmp_path / "out").equal
    assert names(tmp_path) == ["out", "source"]
