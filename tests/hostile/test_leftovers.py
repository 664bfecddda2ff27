"""Links, pipes and names in what an earlier run seems to have left: nothing outside is touched."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import nanotron_fast as nf
from nanotron_fast.checkpoints.journal import read_record
from nanotron_fast.checkpoints.ownership import Lock
from nanotron_fast.checkpoints.partial import Leftover
from nanotron_fast.errors import DestinationError
from nanotron_fast.moves.files import Folder
from tests.fuzz.oracle import limited
from tests.modelzoo import make

RUN = "0a1b2c3d"
MODEL = make("llama", num_hidden_layers=1)


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    """A folder of a run, with a journal that says that a file is whole; and one outside."""
    partial = tmp_path / "place" / f"out.partial-{RUN}"
    (partial / "content").mkdir(parents=True)
    entry = {"file": "inner/config.json", "size": 5, "synced": True, "boot": ""}
    (partial / "journal-0").write_text(json.dumps(entry) + "\n")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_text("mine!")
    return partial


def read(partial: Path) -> Leftover | None:
    return Leftover.read(partial, partial.parent / "out", RUN)


def test_a_file_behind_a_link_is_not_whole(partial: Path) -> None:
    """Else the run that goes on would move it away from where it is."""
    (partial / "content" / "inner").symlink_to("../../../outside")
    leftover = read(partial)
    assert leftover is not None
    assert leftover.finished == {}
    (partial / "content" / "inner").unlink()
    (partial / "content" / "inner").mkdir()
    (partial / "content" / "inner" / "config.json").write_text("whole")
    leftover = read(partial)
    assert leftover is not None
    assert [*leftover.finished] == ["inner/config.json"]


@pytest.mark.parametrize("name", ["content", "replaced"])
def test_links_in_the_place_of_its_folders(name: str, partial: Path) -> None:
    """What they lead to would be taken for what was in the destination's place."""
    commit = {"content": (partial / "content").stat().st_ino, "parts": [], "before": []}
    if name == "content":
        (partial / "content").rmdir()
    (partial / name).symlink_to("../../outside")
    (partial / "commit").write_text(json.dumps({**commit, "before": ["config.json"]}))
    (partial.parent / "out").mkdir()
    leftover = read(partial)
    if leftover is not None:
        leftover.undo()
    assert (partial.parent.parent / "outside" / "config.json").read_text() == "mine!"
    assert leftover is None


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "a\0b", "\ud800", "x" * 300, 7, None])
@pytest.mark.parametrize("key", ["parts", "before"])
def test_a_mark_with_other_names_is_none(key: str, name: object, partial: Path) -> None:
    (partial / "replaced").mkdir()
    commit = {"content": (partial / "content").stat().st_ino, "parts": [], "before": []}
    (partial / "commit").write_text(json.dumps(commit))
    leftover = read(partial)
    assert leftover is not None
    assert leftover.commit == commit
    (partial / "commit").write_text(json.dumps({**commit, key: [name]}))
    leftover = read(partial)
    assert leftover is not None
    assert leftover.commit is None


def test_a_pipe_for_a_mark(partial: Path) -> None:
    os.mkfifo(partial / "commit")
    with limited(5):
        leftover = read(partial)
    assert leftover is not None
    assert leftover.commit is None


@pytest.mark.parametrize("share", [[1, 10**15], [0, 2], [3, 2], [-1, 2], [1, True], [1]])
def test_shares_that_cannot_be(share: object, partial: Path) -> None:
    (partial / "journal-0").write_text(json.dumps({"made": None, "share": share}) + "\n")
    with Folder.open(partial) as folder:
        assert read_record(folder).share is None
    (partial / "journal-0").write_text(json.dumps({"made": None, "share": [2, 3]}) + "\n")
    with Folder.open(partial) as folder:
        assert read_record(folder).share == (2, 3)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("make_lock", "message"),
    [
        (dangling, "Too many levels of symbolic links"),
        (os.mkfifo, "by whom cannot be read"),
        (Path.mkdir, "Is a directory"),
    ],
)
def test_what_is_no_lock(make_lock: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    """It is neither waited for nor followed."""
    source = MODEL.save(tmp_path / "source")
    make_lock(tmp_path / ".out.nanotron_fast.lock")
    with limited(5), pytest.raises(DestinationError, match=message):
        nf.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "nowhere").exists()


def test_an_old_pipe_is_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    os.mkfifo(path)
    os.utime(path, (time.time() - 1000,) * 2)
    lock = Lock(path, tmp_path / "out", RUN)
    with limited(5):
        lock.acquire()
    lock.release()
    assert [*tmp_path.iterdir()] == []


def test_another_conversion_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --overwrite-partial and without --resume; once it was removed twice, which failed."""
    out = tmp_path / "out"
    partial = tmp_path / f"out.partial-{RUN}"
    (partial / "content").mkdir(parents=True)
    (partial / "content" / "x").write_bytes(struct.pack("<Q", 1))
    made = {"layout": "", "choices": {"family": "other"}, "sources": {}}
    entry = {"file": "x", "size": 8, "synced": True, "boot": ""}
    lines = (json.dumps({"made": made, "share": None, "begun": 1.0}), json.dumps(entry))
    (partial / "journal-0").write_text("\n".join(lines) + "\n")
    source = MODEL.save(tmp_path / "source")
    with pytest.raises(DestinationError, match="1 whole file"):
        nf.convert(source, out)
    nf.convert(source, out, overwrite_partial=True)
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]
