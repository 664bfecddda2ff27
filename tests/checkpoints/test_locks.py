"""What is left beside a destination by runs that are killed while they make or break a lock."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast as nf
from nanotron_fast.checkpoints import ownership
from nanotron_fast.checkpoints.destination import Destination
from nanotron_fast.checkpoints.owners import Owner
from nanotron_fast.checkpoints.reshard import reshard
from tests.modelzoo import make

GOLDEN = Path(__file__).parents[1] / "golden" / "training" / "llama_tied_tp2_zero0"
MODEL = make("llama", num_hidden_layers=1)
RUN = "0a1b2c3d"
HERE = Owner.this(RUN)
DEAD = replace(HERE, ticks=1)
ELSEWHERE = replace(HERE, host="node7", boot="b")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return MODEL.save(tmp_path / "source")


def left(folder: Path) -> list[str]:
    return sorted(set(os.listdir(folder)) - {"source", "out"})


def put(path: Path, owner: Owner | None, silent_seconds: float = 0) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("" if owner is None else json.dumps(asdict(owner)))
    now = path.stat().st_mtime
    os.utime(path, (now - silent_seconds, now - silent_seconds))
    return path


def killed(work: Callable[[], object], monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Work in a child, which is killed where it would make the call."""
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(os, call, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_an_answer_to_link_that_is_lost(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client of NFS asks again, and hears that the name is taken: by itself."""
    link = os.link

    def twice(*args: Any, **given: Any) -> None:
        link(*args, **given)
        link(*args, **given)

    monkeypatch.setattr(os, "link", twice)
    nf.convert(source, tmp_path / "out")
    assert left(tmp_path) == []
    assert nf.verify(source, tmp_path / "out").equal


@pytest.mark.parametrize("is_inside", [False, True])
@pytest.mark.parametrize("call", ["write", "link", "unlink"])
def test_killed_while_a_lock_is_made(
    call: str, is_inside: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if is_inside:
        out.mkdir()
    target = Destination(out, source=source, overwrite=False)
    folder = out if is_inside else tmp_path
    killed(target.lock, monkeypatch, call)
    names = [name for name in left(folder) if name.endswith(".new")]
    # Nothing says whose an empty one is.
    if call == "write":
        nf.convert(source, out)
        assert [name for name in left(folder) if name.endswith(".new")] == names
        os.utime(folder / names[0], (1, 1))
        nf.convert(source, out, overwrite=True)
    else:
        assert names
        nf.convert(source, out)
    assert left(tmp_path) == []
    assert not list(out.glob(".nanotron_fast*"))


def test_killed_while_a_lock_is_broken(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    put(tmp_path / ".out.nanotron_fast.lock", DEAD)
    target = Destination(out, source=source, overwrite=False)
    killed(target.lock, monkeypatch, "unlink")
    assert {name.rpartition(".")[2] for name in left(tmp_path)} == {"new", "broken"}
    nf.convert(source, out)
    assert left(tmp_path) == []


HOUR = ownership.LITTER_SECONDS


@pytest.mark.parametrize(
    ("ending", "owner", "silent_seconds", "stays"),
    [
        ("new", HERE, 10 * HOUR, True),
        ("new", DEAD, 0, False),
        ("new", ELSEWHERE, HOUR - 60, True),
        ("new", ELSEWHERE, HOUR + 60, False),
        ("new", None, HOUR - 60, True),
        ("new", None, HOUR + 60, False),
        # Whose lock it was is dead, and who broke it may live: it has only just got its name.
        ("broken", DEAD, 10 * HOUR, True),
    ],
)
def test_what_may_live_stays(
    ending: str,
    owner: Owner | None,
    silent_seconds: float,
    stays: bool,
    source: Path,
    tmp_path: Path,
) -> None:
    path = put(tmp_path / f".nanotron_fast.{RUN}.{ending}", owner, silent_seconds)
    nf.convert(source, tmp_path / "out")
    assert path.exists() == stays


def test_names_that_are_not_ours_stay(source: Path, tmp_path: Path) -> None:
    mine = [".nanotron_fast.0a1b2c3d.news", ".nanotron_fast.0a1b2c3.new", "nanotron_fast.new"]
    for name in mine:
        put(tmp_path / name, DEAD, 10 * HOUR)
    (tmp_path / ".nanotron_fast.11111111.new").symlink_to(put(tmp_path / "a", DEAD, 10 * HOUR))
    (tmp_path / ".nanotron_fast.22222222.new").mkdir()
    dead = put(tmp_path / ".nanotron_fast.fffffff0.new", DEAD)
    before = left(tmp_path)
    nf.convert(source, tmp_path / "out")
    assert left(tmp_path) == [name for name in before if name != dead.name]


def test_locks_of_dead_shares_go_with_the_last_run(source: Path, tmp_path: Path) -> None:
    put(tmp_path / ".out.nanotron_fast.lock-2-of-3", DEAD)
    nf.convert(source, tmp_path / "out", share=(1, 1))
    assert ".out.nanotron_fast.lock-2-of-3" in left(tmp_path)
    nf.convert(source, tmp_path / "out", finish=True)
    assert left(tmp_path) == []


def test_a_name_of_the_latest_step_that_was_not_given(tmp_path: Path) -> None:
    old, young = (tmp_path / f".latest.txt.partial-{number}" for number in (1, 2))
    put(old, None, HOUR + 60)
    put(young, None, HOUR - 60)
    reshard(GOLDEN, tmp_path / "2", tp=1)
    assert sorted(os.listdir(tmp_path)) == [young.name, "2", "latest.txt"]
