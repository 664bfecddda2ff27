"""Shares of a conversion, each a run of its own, and the run that makes the result of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nanotron_fast as nf
from nanotron_fast.checkpoints.destination import Destination
from nanotron_fast.errors import CheckpointError, ConfigError, DestinationError
from tests.checkpoints.kill_loop import tree
from tests.checkpoints.test_resume import MODEL, TP2, names, stopped


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return MODEL.save(tmp_path / "source")


def test_shares(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="files are missing"):
        nf.convert(source, out, topology=TP2, finish=True)
    for number in (3, 1):
        nf.convert(source, out, topology=TP2, share=(number, 3))
        assert not out.exists()
    message = r"out: \d+ of \d+ files are missing: shares 2 of 3 are not done; do each with --share"
    with pytest.raises(CheckpointError, match=message):
        nf.convert(source, out, topology=TP2, finish=True)
    with pytest.raises(DestinationError, match=r"share \d of 3.*--finish makes DST of all shares"):
        nf.convert(source, out, topology=TP2)
    with pytest.raises(DestinationError, match=r"share 1 of 3.*--resume goes on with it"):
        nf.convert(source, out, topology=TP2, share=(1, 3))
    with pytest.raises(DestinationError, match="is of another conversion: tp is 1 now"):
        nf.convert(source, out, share=(2, 3))
    stopped(source, out, 2, share=(2, 3))
    report = nf.convert(source, out, topology=TP2, share=(2, 3), resume=True)
    assert report.share == (2, 3)
    nf.convert(source, out, topology=TP2, finish=True)
    nf.convert(source, tmp_path / "wanted", topology=TP2)
    assert tree(out) == tree(tmp_path / "wanted")
    assert names(tmp_path) == ["out", "source", "wanted"]


def test_a_run_that_finishes_gives_up_nothing(source: Path, tmp_path: Path) -> None:
    """It writes no tensors: it says which shares are to be done again."""
    out = tmp_path / "out"
    for number in (1, 2, 3):
        nf.convert(source, out, topology=TP2, share=(number, 3))
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=r"--finish: .*with --share I/N --overwrite-partial"):
        nf.convert(source, out, topology=TP2, finish=True, overwrite_partial=True)
    assert tree(tmp_path) == before
    path = source / "model.safetensors"
    os.utime(path)
    nf.convert(source, out, topology=TP2, share=(2, 4), overwrite_partial=True)
    os.utime(path)
    with pytest.raises(DestinationError, match="; do shares 2 of 4 again, each with --overwrite-p"):
        nf.convert(source, out, topology=TP2, finish=True)


def test_shares_of_a_source_that_has_changed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in (1, 2):
        nf.convert(source, out, topology=TP2, share=(number, 2))
    os.utime(source / "model.safetensors")
    with pytest.raises(DestinationError, match="; do shares 1, 2 of 2 again, each with --overwri"):
        nf.convert(source, out, topology=TP2, finish=True)
    for number in (1, 2):
        nf.convert(source, out, topology=TP2, share=(number, 2), overwrite_partial=True)
    nf.convert(source, out, topology=TP2, finish=True)
    assert nf.verify(source, out).equal
    assert names(tmp_path) == ["out", "source"]


def test_shares_of_different_numbers(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for share in ((1, 3), (3, 3), (1, 4)):
        nf.convert(source, out, topology=TP2, share=share)
    message = (
        r"files are missing: shares 1, 3 of 3 and shares 1 of 4 are there, of different N; "
        r"shares 2 of 3, or shares [234, ]+ of 4 are still to be done"
    )
    with pytest.raises(CheckpointError, match=message):
        nf.convert(source, out, topology=TP2, finish=True)
    # What is left may be done either way.
    nf.convert(source, out, topology=TP2, share=(2, 3))
    nf.convert(source, out, topology=TP2, finish=True)
    assert nf.verify(source, out).equal
    assert names(tmp_path) == ["out", "source"]


def test_shares_that_begin_together(source: Path, tmp_path: Path) -> None:
    """None sweeps away what another has only begun, or has just finished."""
    program = """
import sys
import nanotron_fast as nf
from nanotron_fast.checkpoints.destination import Destination
from nanotron_fast.checkpoints.journal import Journal
import time
begin = Journal.begin
def late(self, *given):
    time.sleep(0.2)
    begin(self, *given)
Journal.begin = late
nf.convert(sys.argv[1], sys.argv[2], topology=nf.Topology(tp=2), share=(int(sys.argv[3]), 4))
"""
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    running = [
        subprocess.Popen([sys.executable, "-c", program, source, out, str(number)], env=environment)
        for number in range(1, 5)
    ]
    assert [each.wait(100) for each in running] == [0] * 4
    nf.convert(source, out, topology=TP2, finish=True)
    assert nf.verify(source, out).equal
    assert names(tmp_path) == ["out", "source"]


def test_a_plain_run_beside_a_share_that_begins(source: Path, tmp_path: Path) -> None:
    """It has claimed its share, and has no folder yet."""
    share = Destination(tmp_path / "out", source=source, overwrite=False, share=(2, 3))
    share.lock()
    with pytest.raises(DestinationError, match=r"another run .* \(share 2 of 3\)"):
        nf.convert(source, tmp_path / "out")
    share.open()
    for options in ({}, {"overwrite_partial": True}, {"finish": True}, {"share": (2, 3)}):
        with pytest.raises(DestinationError, match="another run is writing to it"):
            nf.convert(source, tmp_path / "out", **options)
    nf.convert(source, tmp_path / "out", share=(1, 3))
    assert share.partial.is_in_place()
    share.abort()


@pytest.mark.parametrize("share", [(0, 3), (4, 3), (1, 0)])
def test_shares_that_are_none(share: tuple[int, int], source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--share {share[0]}/{share[1]}: "):
        nf.convert(source, tmp_path / "out", share=share)
