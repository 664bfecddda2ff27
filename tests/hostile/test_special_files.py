"""Pipes, devices and files of the kernel's where a checkpoint's files should be."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

import nanotron_fast
from nanotron_fast.checkpoints import small_files
from nanotron_fast.checkpoints.small_files import copy_file
from nanotron_fast.errors import CheckpointError, NanotronFastError
from nanotron_fast.formats.plain_file import digest_whole, open_plain, read_small
from nanotron_fast.moves.files import FileState, ReadFile
from tests.modelzoo import make

MODEL = make("llama", num_hidden_layers=1)
NAMES = ["tokenizer.json", "config.json", "model.safetensors", "generation_config.json"]


def make_special(kind: str, path: Path) -> None:
    """Puts a special file where another may have been."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fspath(path))
    else:
        path.symlink_to(kind)


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/proc/kmsg", "/proc/self/status"])
@pytest.mark.parametrize("name", NAMES)
def test_in_the_place_of_a_file(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error, or a conversion without it; no waiting, and no bytes of the kernel's."""
    source = MODEL.save(tmp_path / "source")
    make_special(kind, source / name)
    out = tmp_path / "out"
    refusal = ""
    try:
        nanotron_fast.convert(source, out)
    except NanotronFastError as error:
        refusal = str(error)
    assert out.exists() == (not refusal)
    assert name in refusal if refusal else not (out / name).exists()


@pytest.mark.parametrize("name", ["model_weight.safetensors", "model_config.json", "latest.txt"])
def test_in_a_nanotron_checkpoint(name: str, tmp_path: Path) -> None:
    out = tmp_path / "steps" / "10"
    nanotron_fast.convert(MODEL.save(tmp_path / "source"), out)
    (out.parent / "latest.txt").write_text("10")
    make_special("pipe", next(iter(sorted(out.parent.rglob(name)))))
    with pytest.raises(NanotronFastError):
        nanotron_fast.convert(out.parent, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pipe", "it is a pipe, not a plain file"),
        ("socket", "it is a socket, not a plain file"),
        ("/dev/zero", "it is a device, not a plain file"),
        ("/proc/self/status", "which the kernel makes up, not a plain file"),
    ],
)
def test_they_are_neither_read_nor_copied(
    kind: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("special")
    make_special(kind, path)
    with pytest.raises(CheckpointError, match=message):
        read_small(path)
    then = ReadFile(FileState.of(os.stat(path)), "", is_whole=True)
    with pytest.raises(CheckpointError, match=message):
        copy_file(path, tmp_path / "copy", then, fsync=False)
    assert not (tmp_path / "copy").exists()
    if not kind.startswith("/proc"):
        with pytest.raises(CheckpointError, match=message):
            open_plain(path)


def test_a_file_that_is_cut_while_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    write = small_files.write_all

    def cut(descriptor: int, data: bytes, name: str | Path) -> None:
        os.truncate(path, 1)
        write(descriptor, data[:1], name)

    monkeypatch.setattr("nanotron_fast.checkpoints.small_files._BLOCK_BYTES", 1)
    monkeypatch.setattr("nanotron_fast.checkpoints.small_files.write_all", cut)
    then = digest_whole(path)
    with pytest.raises(CheckpointError, match=r"changed while it was read \(2 bytes then, 1 now\)"):
        copy_file(path, tmp_path / "copy", then, fsync=True)


def test_a_document_that_is_too_long(tmp_path: Path) -> None:
    """A sparse file: it takes no room, and would take all memory."""
    source = MODEL.save(tmp_path / "source")
    os.truncate(source / "config.json", 1 << 40)
    with pytest.raises(CheckpointError, match="over the limit of 268,435,456"):
        nanotron_fast.plan(source, tmp_path / "out")
