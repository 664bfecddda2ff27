"""Destinations that are there already, are mounted, or must not lose what lies in them."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast
from nanotron_fast import Topology
from nanotron_fast.checkpoints import carrying_out as conversion
from nanotron_fast.checkpoints import placing, small_files
from nanotron_fast.checkpoints.destination import Destination
from nanotron_fast.errors import DestinationError
from tests.modelzoo import make, read_tensors

MODEL = make("llama", num_hidden_layers=1)
# In a mount namespace of its own: a volume, one that is bound, one under a parent that is locked.
MOUNTED = """
import os, subprocess, sys
from pathlib import Path
import nanotron_fast as nf
source, root = map(Path, sys.argv[1:])

def mount(*words):
    subprocess.run(["mount", *map(str, words)], check=True)

def convert(name, **options):
    before = sorted(os.listdir(root))
    try:
        nf.convert(source, root / name, **options)
    except Exception as error:
        print(type(error).__name__, error)
    assert sorted(os.listdir(root)) == before, os.listdir(root)

for name in ("volume", "bound", "data", "locked", "locked/out", "small"):
    (root / name).mkdir()
mount("-t", "tmpfs", "none", root / "volume")
convert("volume")
assert nf.verify(source, root / "volume").equal
convert("volume", overwrite=True, topology=nf.Topology(tp=2))
assert nf.verify(source, root / "volume").equal
assert nf.inspect(root / "volume").topology.tp == 2
assert not [name for name in os.listdir(root / "volume") if name.startswith(".")]

mount("--bind", root / "data", root / "bound")
convert("bound")
assert nf.verify(source, root / "data").equal

# The same inode by two names: the source would be overwritten.
mount("--bind", source, root / "data")
convert("data", overwrite=True)
convert("data/inside")
mount("--bind", root / "locked", root / "locked")
mount("-t", "tmpfs", "none", root / "locked/out")
mount("-o", "remount,ro,bind", root / "locked")
convert("locked/out")
assert nf.verify(source, root / "locked/out").equal
convert("locked/new")

# Room for the bytes, and not for the blocks.
mount("-t", "tmpfs", "-o", "size=200k", "none", root / "small")
convert("small")
assert os.listdir(root / "small") == []
mount("-t", "tmpfs", "-o", "nr_inodes=20", "none", root / "small")
convert("small")
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return MODEL.save(tmp_path / "source")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def refused(source: Path, out: Path, message: str, **options: Any) -> None:
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(DestinationError, match=message):
        nanotron_fast.convert(source, out, **options)
    assert sorted(source.parent.rglob("*")) == before


def test_mounted_destinations(source: Path, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount")
    root = tmp_path / "root"
    root.mkdir()
    result = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", MOUNTED, str(source), str(root)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert result.returncode == 0, result.stderr
    same, inside, locked, full, files = result.stdout.splitlines()
    assert "the destination is the source" in same
    assert "the destination lies inside the source" in inside
    assert f"it cannot be written: Read-only file system: '{root}/locked/new'" in locked
    assert "bytes in blocks of 4,096, and 200,704 are free" in full
    assert "files, and the file system has room for" in files


def test_a_prepared_directory_keeps_mode_and_group(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if os.geteuid() == 0:
        os.chown(out, -1, 12345)
    out.chmod(0o2775)
    before = out.stat()
    for overwrite in (False, True):
        nanotron_fast.convert(source, out, overwrite=overwrite)
        after = out.stat()
        assert (after.st_mode, after.st_gid) == (before.st_mode, before.st_gid)
        assert overwrite or after.st_ino == before.st_ino
        for path in out.rglob("*"):
            assert path.stat().st_gid == before.st_gid
            assert not path.is_dir() or path.stat().st_mode & stat.S_ISGID


@pytest.mark.parametrize("is_linked", [False, True])
@pytest.mark.parametrize("where", ["out.partial-0a1b2c3d", "out/.nanotron_fast.partial-0a1b2c3d"])
def test_a_source_within_what_a_run_has_left(
    where: str, is_linked: bool, source: Path, tmp_path: Path
) -> None:
    """It would be swept away."""
    partial = tmp_path / where
    partial.mkdir(parents=True)
    (partial / "journal-0").write_text("")
    source = source.rename(partial / "content")
    place = source
    if is_linked:
        place = tmp_path / "link"
        place.symlink_to(source)
    message = "content, which is read, lies in .*partial-0a1b2c3d, which an earlier run has left"
    if where.startswith("out/"):
        message = "lies inside the destination"
    for given in ({}, {"overwrite_partial": True}, {"resume": True}):
        with pytest.raises(DestinationError, match=message):
            nanotron_fast.convert(place, tmp_path / "out", **given)
    assert read_tensors(source) == MODEL.tensors


def test_weights_behind_links_into_the_destination(source: Path, tmp_path: Path) -> None:
    """As a snapshot of the Hub's cache: its files are links to where they really lie."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (source / "model.safetensors").rename(blobs / "model.safetensors")
    (source / "model.safetensors").symlink_to(blobs / "model.safetensors")
    refused(source, blobs, "blobs, which is read, lies inside the destination", overwrite=True)


def test_a_tokenizer_within_the_destination(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "tokenizer.json").write_text("{}")
    message = "out, which is read, lies inside the destination"
    refused(source, out, message, overwrite=True, tokenizer=out)


@pytest.mark.parametrize(
    ("contents", "shown"),
    [
        (["thesis.tex", "photo.jpg"], "photo.jpg, thesis.tex;"),
        (["config.json", "thesis.tex"], "more in it: thesis.tex;"),
        (["config.json", "tokenizer_thesis.txt", "my_config.json"], "my_config.json, tokenizer_th"),
        (["config.json", ".cache/keys"], "more in it: .cache;"),
        (["config.json", ".cache/huggingface/a.lock", "vocabulary.txt"], "in it: vocabulary.txt;"),
        (["config.json", "precious.safetensors"], "more in it: precious.safetensors;"),
        (["config.json", "README-draft.md", "LICENSE_KEYS"], "LICENSE_KEYS, README-draft.md;"),
        (["tokenizer.json", "model_config.json"], "model_config.json, tokenizer.json;"),
        (["checkpoint_metadata.json"], "checkpoint_metadata.json;"),
        (["tokenizer.json"], "tokenizer.json;"),
        (["config.json", ".git/HEAD"], "more in it: .git;"),
        (["config.json", "model/train.py"], "more in it: model;"),
        (["model_config.json", "model/model/w.safetensors", "10/config.json"], "in it: 10;"),
        ([f"config.json{number}" for number in range(7)], "config.json4 and 2 more;"),
    ],
    ids=str,
)
def test_overwrite_refuses_what_is_no_checkpoint(
    contents: list[str], shown: str, source: Path, tmp_path: Path
) -> None:
    for name in contents:
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"model_type": "llama"}' if name == "config.json" else "precious")
    refused(source, tmp_path / "out", shown, overwrite=True)


@pytest.mark.parametrize("config", ["", "{}", "[]", "precious"])
def test_overwrite_refuses_a_configuration_of_something_else(
    config: str, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(config)
    refused(source, tmp_path / "out", "more in it: config.json;", overwrite=True)


def test_what_a_conversion_carried_may_be_replaced(source: Path, tmp_path: Path) -> None:
    """By another model, too, which has nothing of the kind; and by none that adds to it."""
    plain = MODEL.save(tmp_path / "plain")
    names = {"files": ["assets/words.dat", "data.jsonl"]}
    (source / "tokenizer_config.json").write_text(json.dumps(names))
    (source / "assets").mkdir()
    for name in ("notes.txt", "data.jsonl", "modules.json", "assets/words.dat"):
        (source / name).write_text("carried")
    there, again, back = tmp_path / "there", tmp_path / "again", tmp_path / "back"
    nanotron_fast.convert(source, there)
    assert (there / "assets" / "words.dat").is_file()
    nanotron_fast.convert(there, again, to="nanotron")
    for out in (there, again):
        (out / "mine.txt").write_text("precious")
        refused(plain, out, "more in it: mine.txt;", overwrite=True)
        (out / "mine.txt").unlink()
        (out / "assets" / "mine.txt").write_text("precious")
        refused(plain, out, "more in it: assets;", overwrite=True)
        (out / "assets" / "mine.txt").unlink()
    nanotron_fast.convert(there, back)
    for _ in range(2):
        nanotron_fast.convert(there, back, overwrite=True)
    nanotron_fast.convert(plain, there, overwrite=True)
    assert not (there / "notes.txt").exists()
    # A Hugging Face folder has no note: what its configurations name is its own, the rest is not.
    refused(there, back, "more in it: modules.json, notes.txt;", overwrite=True)


def test_overwrite_replaces_what_trainers_write(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in (
        *("model_config.json", "config.yaml", "checkpoint_metadata.json", "random/rank_0.pt"),
        *("model/model/old.safetensors", "optimizer/optimizer_config.json", "lr_scheduler/a.pt"),
        *("pytorch_model-00001-of-00002.bin", "trainer_state.json", "README.md", "LICENSE.txt"),
        *("modeling_own.py", ".cache/huggingface/x.lock", "tokenizer.model.v3", ".gitattributes"),
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("old")
    nanotron_fast.convert(source, out, overwrite=True)
    assert not any(path.is_file() and path.read_bytes() == b"old" for path in out.rglob("*"))
    nanotron_fast.convert(out, tmp_path / "back")
    assert read_tensors(tmp_path / "back") == MODEL.tensors


class Killed(BaseException):
    """SIGKILL: nothing is done any more."""


def killed(
    source: Path, out: Path, num_moved: int, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[str]:
    """Leaves what a run leaves that is killed with so many parts in their place."""
    rename, moved = Path.rename, []

    def stop(self: Path, target: Path) -> Path:
        if len(moved) == num_moved:
            raise Killed
        moved.append(self.name)
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", stop)
        patched.setattr(Destination, "_can_be_exchanged", lambda self: False)
        patched.setattr(Destination, "abort", lambda self, **_: self._lock.release())
        # Nothing is moved back, either.
        patched.setattr(
            "nanotron_fast.checkpoints.placing.reversed", lambda done: [], raising=False
        )
        with pytest.raises(Killed):
            nanotron_fast.convert(source, out, **options)
    return moved


@pytest.mark.parametrize("num_moved", [0, 2, 4])
def test_a_run_that_was_killed_while_its_parts_moved(
    num_moved: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    moved = killed(source, out, num_moved, monkeypatch)
    partial, *parts = names(out)
    assert partial.startswith(".nanotron_fast.partial-")
    # The marks of a whole checkpoint come last: checkpoint_metadata.json would be the next.
    assert moved == ["config.yaml", "model", "nanotron_fast.json", "model_config.json"][:num_moved]
    assert parts == sorted(moved)
    with pytest.raises(DestinationError, match="--resume goes on with it"):
        nanotron_fast.convert(source, out)
    # What had moved up is back with the rest.
    assert names(out) == [partial]
    (out / "mine").write_text("precious")
    refused(source, out, "it is not empty", resume=True)
    (out / "mine").unlink()
    report = nanotron_fast.convert(source, out, resume=True)
    assert not report.part.outputs
    assert not [name for name in names(out) if name.startswith(".")]
    assert nanotron_fast.verify(source, out).equal


@pytest.mark.parametrize("num_moved", range(8))
def test_a_run_that_was_killed_while_it_replaced(
    num_moved: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there before is put back by the next, or replaced."""
    out = tmp_path / "out"
    nanotron_fast.convert(source, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    killed(source, out, num_moved, monkeypatch, overwrite=True, topology=Topology(tp=2))
    with pytest.raises(DestinationError, match="--resume goes on with it"):
        nanotron_fast.convert(source, out, overwrite=True, topology=Topology(tp=2))
    assert {path: path.read_bytes() for path in before} == before
    options = {"topology": Topology(tp=2), "overwrite": True, "resume": True}
    assert not nanotron_fast.convert(source, out, **options).part.outputs
    assert nanotron_fast.inspect(out).topology == Topology(tp=2)
    assert nanotron_fast.verify(source, out).equal
    assert names(tmp_path) == ["out", "source"]
    assert not [name for name in names(out) if name.startswith(".")]


def test_a_run_that_was_killed_with_all_parts_in_place(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is whole then: it is not taken for what is left of a run."""
    out = tmp_path / "out"
    out.mkdir()

    def kill(self: Destination) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Destination, "_end", kill)
        patched.setattr(Destination, "abort", lambda self, **_: self._lock.release())
        with pytest.raises(Killed):
            nanotron_fast.convert(source, out)
    assert nanotron_fast.verify(source, out).equal
    refused(source, out, "it is not empty")
    nanotron_fast.convert(source, out, overwrite=True)
    assert not [name for name in names(out) if name.startswith(".")]
    assert names(tmp_path) == ["out", "source"]


@pytest.mark.parametrize("can_exchange", [False, True])
def test_a_run_that_was_killed_between_two_names(
    can_exchange: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no moment is the checkpoint lost that was to be replaced."""
    out = tmp_path / "out"
    nanotron_fast.convert(source, out)
    rename, exchange = Path.rename, placing.exchange

    def stop(self: Path, target: Path) -> Path:
        if self.name == "content":
            raise Killed
        return rename(self, target)

    def stop_after(one: Path, other: Path) -> bool:
        if can_exchange:
            exchange(one, other)
            raise Killed
        return False

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", stop)
        patched.setattr(placing, "exchange", stop_after)
        patched.setattr(Destination, "abort", lambda self, **_: self._lock.release())
        if not can_exchange:
            # The name is free, and nothing is put back.
            def free(partial: Any, path: Path) -> None:
                partial.mark()
                rename(path, partial.path / "replaced")
                raise Killed

            patched.setattr(placing, "replace", free)
        with pytest.raises(Killed):
            nanotron_fast.convert(source, out, overwrite=True, topology=Topology(tp=2))
    assert out.exists() == can_exchange
    options = {"topology": Topology(tp=2), "overwrite": True, "resume": True}
    report = nanotron_fast.convert(source, out, **options)
    # The result of the first run was there already, and what it replaced was no work of its own.
    assert bool(report.part.outputs) == can_exchange
    assert nanotron_fast.inspect(out).topology == Topology(tp=2)
    assert names(tmp_path) == ["out", "source"]


def test_empty_folders_of_dead_runs_are_swept(source: Path, tmp_path: Path) -> None:
    """A run may be killed before it has a journal."""
    (tmp_path / "out.partial-0a1b2c3d").mkdir()
    (tmp_path / "out.partial-0a1b2c3e" / "content").mkdir(parents=True)
    nanotron_fast.convert(source, tmp_path / "out")
    assert names(tmp_path) == ["out", "source"]


def test_parents_that_were_made_go_with_the_rest(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(conversion.engine, "execute", fail)
    with pytest.raises(OSError, match="No space left"):
        nanotron_fast.convert(source, tmp_path / "a" / "b" / "out")
    assert names(tmp_path) == ["source"]


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json"])
def test_a_full_disk_names_the_small_file(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "tokenizer.json").write_text("{}")

    write = small_files.write_all

    def full(descriptor: int, data: bytes, path: str | Path) -> None:
        if str(path).endswith(name):
            raise OSError(28, "No space left on device", str(path))
        write(descriptor, data, path)

    monkeypatch.setattr(small_files, "write_all", full)
    with pytest.raises(OSError, match=f"No space left on device: '.*/{name}'"):
        nanotron_fast.convert(source, tmp_path / "out")
    monkeypatch.undo()
    nanotron_fast.convert(source, tmp_path / "out", resume=True)
    assert names(tmp_path) == ["out", "source"]
