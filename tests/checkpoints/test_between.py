"""What is said of a checkpoint that was being replaced when a run was killed."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast as nf
from nanotron_fast.checkpoints import placing
from nanotron_fast.checkpoints.destination import Destination
from nanotron_fast.checkpoints.load import load_into
from nanotron_fast.errors import CheckpointError
from tests.checkpoints.test_resume import MODEL, TP2, names


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return MODEL.save(tmp_path / "source")


def killed(source: Path, out: Path, num_renames: int) -> None:
    """A run in a child, killed at the rename after so many, where names are not exchanged."""
    child = os.fork()
    if child == 0:
        rename, done = Path.rename, []

        def stop(self: Path, target: Path) -> Path:
            if len(done) == num_renames:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(self)
            return rename(self, target)

        try:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(Path, "rename", stop)
                patched.setattr(placing, "exchange", lambda *_: False)
                nf.convert(source, out, topology=TP2, overwrite=True)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("way", ["mv", "convert"])
def test_between_two_names(way: str, link: bool, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "it's out"
    nf.convert(source, out)
    name: Any = out
    if link:
        name = tmp_path / "link"
        name.symlink_to(out.name)
    killed(source, name, 1)
    (partial,) = tmp_path.glob("it's out.partial-*")
    command = f"mv {shlex.quote(f'{partial}/replaced')} {shlex.quote(str(out))}"
    for read in (
        lambda: nf.inspect(name),
        lambda: nf.check_manifest(name),
        lambda: nf.verify(source, name),
        lambda: nf.convert(name, tmp_path / "back"),
        lambda: nf.convert(source, tmp_path / "back", tokenizer=name),
        lambda: load_into({}, name, topology=nf.Topology(), rank=0),
    ):
        with pytest.raises(CheckpointError, match="had it lies in") as caught:
            read()
        assert f"{name}: no such directory: a conversion ended while its" in str(caught.value)
        assert command in str(caught.value)
    if way == "mv":
        subprocess.run(["/bin/sh", "-c", command], check=True)
        assert nf.inspect(name).topology == nf.Topology()
        assert nf.verify(source, name).equal
    nf.convert(source, name, topology=TP2, overwrite=True, resume=True)
    assert nf.inspect(name).topology == TP2
    assert nf.verify(source, name).equal
    assert not list(tmp_path.glob("it's out.partial-*"))
    assert not [each for each in names(out) if each.startswith(".")]


@pytest.mark.parametrize("num_renames", [3, 7])
def test_between_two_sets_of_files(
    num_renames: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    nf.convert(source, out)
    monkeypatch.setattr(Destination, "_can_be_exchanged", lambda self: False)
    killed(source, out, num_renames)
    (partial,) = out.glob(".nanotron_fast.partial-*")
    message = f"took their places in {out}; what was in it before lies in {partial}/replaced: the "
    with pytest.raises(CheckpointError) as caught:
        nf.inspect(out)
    assert message in str(caught.value)
    nf.convert(source, out, topology=TP2, overwrite=True, resume=True)
    assert nf.inspect(out).topology == TP2


def test_a_name_that_nothing_has(tmp_path: Path) -> None:
    (tmp_path / "out.partial-0a1b2c3d").mkdir()
    with pytest.raises(CheckpointError, match=r"no such directory$"):
        nf.inspect(tmp_path / "out")
