"""Two runs onto one destination: the second is refused, whatever the folder holds by then."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast as nf
from nanotron_fast.checkpoints import claims
from nanotron_fast.checkpoints.carrying_out import Report
from nanotron_fast.checkpoints.destination import Destination
from nanotron_fast.checkpoints.owners import DEAD_AFTER_SECONDS, Owner
from nanotron_fast.errors import CheckpointError, DestinationError
from nanotron_fast.moves import engine
from tests.checkpoints.test_resume import MODEL, TP2, names, stopped

ELSEWHERE = replace(Owner.this("0a1b2c3d"), host="node7", boot="b")
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"overwrite": True},
    {"overwrite": True, "resume": True},
    {"overwrite": True, "overwrite_partial": True},
    {"share": (1, 3), "resume": True},
    {"finish": True},
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return MODEL.save(tmp_path / "source")


def while_running(work: Callable[[], None], source: Path, out: Path, **options: Any) -> Report:
    """A run, in which work is done once its files are written."""
    execute = engine.execute

    def late(*args: Any, **given: Any) -> Any:
        result = execute(*args, **given)
        patched.undo()
        work()
        return result

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, "execute", late)
        return nf.convert(source, out, topology=TP2, **options)


@pytest.mark.parametrize("state", ["empty", "none", "made meanwhile", "old", "emptied meanwhile"])
def test_a_second_run_is_refused(state: str, source: Path, tmp_path: Path) -> None:
    """What is in the destination, and whether it is there, says nothing of where the lock lies."""
    out = tmp_path / "out"
    if state == "empty":
        out.mkdir()
    if state in ("old", "emptied meanwhile"):
        nf.convert(source, out)

    def second() -> None:
        if state == "made meanwhile":
            out.mkdir()
        if state == "emptied meanwhile":
            for name in os.listdir(out):
                if not name.startswith("."):
                    path = out / name
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        before = sorted(tmp_path.rglob("*"))
        for options in WAYS:
            refusal = f"another run is writing to it: process {os.getpid()} on"
            if state == "old" and "overwrite" not in options:
                refusal = "it is not empty"
            with pytest.raises(DestinationError, match=refusal):
                nf.convert(source, out, topology=TP2, **options)
            assert sorted(tmp_path.rglob("*")) == before

    while_running(second, source, out, overwrite=state != "empty")
    assert nf.inspect(out).topology == TP2
    assert nf.verify(source, out).equal
    assert names(tmp_path) == ["out", "source"]
    assert not [name for name in names(out) if name.startswith(".")]


def test_a_lock_lies_wherever_another_run_may_look(source: Path, tmp_path: Path) -> None:
    """One that may not write beside the folder still looks there, and the other way round."""
    out = tmp_path / "out"
    out.mkdir()
    beside, within = tmp_path / ".out.nanotron_fast.lock", out / ".nanotron_fast.lock"
    first = Destination(out, source=source, overwrite=False)
    first.lock()
    assert beside.is_file()
    assert within.is_file()
    for gone in (beside, within):
        gone.rename(tmp_path / "kept")
        with pytest.raises(DestinationError, match="another run is writing to it"):
            nf.convert(source, out)
        (tmp_path / "kept").rename(gone)
    first.abort()
    assert names(tmp_path) == ["out", "source"]
    assert names(out) == []


def test_one_that_took_another_place_is_seen(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    first = Destination(out, source=source, overwrite=False)
    places = claims._places
    monkeypatch.setattr(claims, "_places", lambda *given: places(*given)[:1])
    first.lock()
    monkeypatch.setattr(claims, "_places", lambda *given: places(*given)[1:])
    with pytest.raises(DestinationError, match="another run is writing to it"):
        nf.convert(source, out, overwrite_partial=True)
    first.abort()
    monkeypatch.setattr(claims, "_PATIENCE_SECONDS", 0.1)

    def late() -> None:
        lock = out / ".nanotron_fast.lock"
        lock.write_text(json.dumps(asdict(ELSEWHERE)))

    with pytest.raises(DestinationError, match=r"process .* on node7, .*; this one ends"):
        while_running(late, source, out)


def test_what_is_said_where_a_run_has_lost_its_folder(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def take() -> None:
        lock = tmp_path / ".out.nanotron_fast.lock"
        lock.unlink()
        lock.write_text(json.dumps(asdict(ELSEWHERE)))
        shutil.rmtree(next(tmp_path.glob("out.partial-*")))
        raise OSError(2, "No such file or directory", "x")

    with pytest.raises(OSError, match="No such file") as caught:
        while_running(take, source, out)
    (note,) = caught.value.__notes__
    assert re.fullmatch(
        rf"another conversion has {out} now, since nothing was heard of this one: process \d+ on "
        r"node7, since .*; what this one wrote is that one's",
        note,
    )
    os.unlink(tmp_path / ".out.nanotron_fast.lock")

    def remove() -> None:
        shutil.rmtree(next(tmp_path.glob("out.partial-*")))
        raise OSError(2, "No such file or directory", "x")

    with pytest.raises(OSError, match="No such file") as caught:
        while_running(remove, source, out)
    (note,) = caught.value.__notes__
    assert re.fullmatch(r"something has moved or removed \S*out.partial-\w+, to which .*", note)


def test_a_lock_that_is_removed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DestinationError, match="lock is not there any more: something has remov"):
        while_running((tmp_path / ".out.nanotron_fast.lock").unlink, source, out)
    assert not out.exists()


@pytest.mark.parametrize("skew", [-1000.0, 1000.0])
@pytest.mark.parametrize("age", [1.0, DEAD_AFTER_SECONDS + 5])
def test_another_clock_than_the_file_system_s(
    skew: float, age: float, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share of another machine that lives is left alone, whatever this machine's clock says."""
    out = tmp_path / "out"
    stopped(source, out, 2, share=(2, 3))
    (partial,) = tmp_path.glob("out.partial-*")
    run = partial.name.rpartition("-")[2]
    lock = tmp_path / ".out.nanotron_fast.lock-2-of-3"
    lock.write_text(json.dumps(asdict(replace(ELSEWHERE, run=run))))
    touched = lock.stat().st_mtime - age
    os.utime(lock, (touched, touched))
    monkeypatch.setattr("time.time", lambda: touched + age + skew)
    if age < DEAD_AFTER_SECONDS:
        refusal = r"process .* on node7, .* \(share 2 of 3\)"
        for options in ({"finish": True}, {"overwrite_partial": True}, {"resume": True}):
            with pytest.raises(DestinationError, match=refusal):
                nf.convert(source, out, topology=TP2, **options)
        nf.convert(source, out, topology=TP2, share=(1, 3), overwrite_partial=True)
        assert partial.is_dir()
    else:
        with pytest.raises(CheckpointError, match="files are missing: shares 1, 2, 3 of 3 are"):
            nf.convert(source, out, topology=TP2, finish=True)


def test_a_folder_by_two_names(source: Path, tmp_path: Path) -> None:
    """Mounted in two places: each run's lock beside it has another name."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount")
    program = """
import subprocess, sys
from pathlib import Path
from nanotron_fast.checkpoints.destination import Destination
source, root = map(Path, sys.argv[1:])
subprocess.run(["mount", "--bind", root / "data", root / "bound"], check=True)
for one, other in (("data", "bound"), ("bound", "data")):
    first = Destination(root / one, source=source, overwrite=False)
    first.lock()
    try:
        Destination(root / other, source=source, overwrite=False).lock()
    except Exception as error:
        print(error)
    first.abort()
"""
    root = tmp_path / "root"
    for name in ("data", "bound"):
        (root / name).mkdir(parents=True)
    result = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", program, source, root],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("another run is writing to it") == 2
    assert names(root) == ["bound", "data"]


@pytest.mark.parametrize("length", [235, 236, 255])
def test_names_that_leave_no_room(length: int, source: Path, tmp_path: Path) -> None:
    """A lock beside a folder adds 20 bytes to its name. One that is there has room within."""
    out = tmp_path / ("x" * length)
    if length == 235:
        with pytest.raises(DestinationError, match="its name of 235 bytes is too long for what is"):
            nf.convert(source, out, share=(1, 3))
        nf.convert(source, out)
    else:
        with pytest.raises(DestinationError, match=f"its name of {length} bytes is too long for"):
            nf.convert(source, out)
        assert names(tmp_path) == ["source"]
        out.mkdir()
        nf.convert(source, out)
    nf.convert(source, out, topology=TP2, overwrite=True)
    assert nf.inspect(out).topology == TP2
    assert names(tmp_path) == ["source", out.name]
