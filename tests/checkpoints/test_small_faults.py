"""Faults of the system in the small things that a run does: files that Python writes, and names.

Each call is made to fail in turn, in a run of its own. The tensors are the engine's, whose faults
`tests/moves/test_injected_failures.py` injects.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast as nf
from nanotron_fast.checkpoints import reshard as resharding
from nanotron_fast.checkpoints.reshard import reshard
from nanotron_fast.cli.commands import app
from tests.checkpoints.kill_loop import tree
from tests.modelzoo import make

GOLDEN = Path(__file__).parents[1] / "golden" / "training" / "llama_tied_tp2_zero0" / "2"
CODES = (errno.ENOSPC, errno.EIO, errno.EDQUOT)


class Faults:
    """Calls of one kind, counted; one of them may go wrong.

    Args:
        which: the one that does, from 1; 0 for none.
        code: of the error; None makes a write that takes a part.
    """

    def __init__(self, which: int = 0, code: int | None = None) -> None:
        self.which, self.code, self.count = which, code, 0

    def wrapped(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*given: Any, **more: Any) -> Any:
            # Reading is no matter of these tests.
            if name == "open" and not (len(given) > 1 and given[1] & os.O_CREAT):
                return call(*given, **more)
            if name == "mkdir" and os.path.isdir(given[0]) and "dir_fd" not in more:
                return call(*given, **more)
            self.count += 1
            if self.count != self.which:
                return call(*given, **more)
            if self.code is not None:
                raise OSError(self.code, os.strerror(self.code), *_path_of(name, given))
            descriptor, data = given
            return call(descriptor, data[: max(1, len(data) // 2)])

        return run


def _path_of(name: str, given: tuple[Any, ...]) -> tuple[str, ...]:
    """What the system's own errors name: a path, where one was given."""
    return () if name in ("write", "fsync") else (os.fspath(given[0]),)


@contextmanager
def going_wrong(name: str, faults: Faults) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, name, faults.wrapped(getattr(os, name), name))
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make("llama", num_hidden_layers=1, hidden_size=32)
    model.tokenizer = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}
    return model.save(tmp_path_factory.mktemp("source"))


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, list[str]]:
    """The exit code of a command, and the lines of its errors."""
    try:
        app([*map(str, words), "--quiet", "--workers", "1"])
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    return code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, "within") for name in ("open", "write", "fsync", "rename", "mkdir", "link")),
        *(("write", "new"), ("open", "exchange")),
    ],
)
def test_each_call_fails_once(
    name: str, way: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--manifest", "--fsync", *(["--overwrite"] if way == "exchange" else [])]

    def begin() -> dict[str, str]:
        shutil.rmtree(out, ignore_errors=True)
        if way == "exchange":
            nf.convert(source, out, dtype="fp32", workers=1)
        elif way == "within":
            out.mkdir()
        return tree(out) if out.exists() else {}

    begin()
    counted = Faults()
    with going_wrong(name, counted):
        code, _ = run(capsys, "convert", source, out, *options)
    wanted = tree(out)
    assert code == 0
    # A name that is free, and two that are exchanged, are given by a call that Python has not.
    assert (counted.count > 0) == (name != "rename" or way == "within")
    num_whole = 0
    # Of all that is synced, each third, and the last, which is the folder of the result's name.
    step = 3 if name == "fsync" else 1
    for which in range(counted.count, 0, -step):
        before = begin()
        code = CODES[which % len(CODES)]
        with going_wrong(name, Faults(which, code)):
            found, lines = run(capsys, "convert", source, out, *options)
        what = f"{name} {which} of {counted.count}: {lines}"
        assert found == 2, what
        assert lines[0].startswith("error: "), what
        assert os.strerror(code) in lines[0], what
        assert str(tmp_path) in lines[0], what
        assert len(lines) <= 2, what
        # Only whether the name is on the device is open then.
        is_whole = name == "fsync" and f"{out} is whole" in lines[-1]
        assert is_whole or all("--resume goes on with them" in each for each in lines[1:]), what
        assert (tree(out) if out.exists() else {}) == (wanted if is_whole else before), what
        num_whole += is_whole
        again = [*options, *(["--overwrite"] if is_whole else [])]
        found, lines = run(capsys, "convert", source, out, *again, "--resume")
        assert (found, lines) == (0, []), what
        assert tree(out) == wanted, what
        assert os.listdir(tmp_path) == ["out"], what
        assert not [each for each in os.listdir(out) if each.startswith(".nanotron_fast.")], what
    assert num_whole <= 2


def test_each_write_takes_a_part(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = Faults()
    with going_wrong("write", counted):
        assert run(capsys, "convert", source, tmp_path / "out", "--manifest") == (0, [])
    wanted = tree(tmp_path / "out")
    for which in range(1, counted.count + 1):
        shutil.rmtree(tmp_path / "out")
        with going_wrong("write", Faults(which)):
            assert run(capsys, "convert", source, tmp_path / "out", "--manifest") == (0, [])
        assert tree(tmp_path / "out") == wanted
        assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["write", "rename"])
def test_each_call_fails_while_a_run_goes_on(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was whole stays whole, in the folder of the one run or of the other."""
    out = tmp_path / "out"
    last = Faults()
    with going_wrong("write", last):
        assert run(capsys, "convert", source, out, "--manifest") == (0, [])
    wanted = tree(out)
    which, is_over = 0, False
    while not is_over:
        which += 1
        shutil.rmtree(out)
        with going_wrong("write", Faults(last.count, errno.ENOSPC)):
            assert run(capsys, "convert", source, out, "--manifest")[0] == 2
        fault = Faults(which, errno.EIO)
        with going_wrong(name, fault):
            code, lines = run(capsys, "convert", source, out, "--manifest", "--resume")
        is_over = fault.count < which
        assert code == (0 if is_over else 2)
        if not is_over:
            assert not out.exists()
            assert lines[0].startswith("error: "), lines
            assert str(tmp_path) in lines[0], lines
            assert run(capsys, "convert", source, out, "--manifest", "--resume") == (0, [])
        assert tree(out) == wanted
        assert os.listdir(tmp_path) == ["out"]
    assert which > 1


@pytest.mark.parametrize("name", ["open", "write", "rename", "fsync"])
def test_a_latest_step_that_cannot_be_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint is whole then, and is told to be."""
    out = tmp_path / "2"
    reshard(GOLDEN, tmp_path / "wanted", tp=1)
    fault = Faults(1, errno.EIO)
    call = fault.wrapped(getattr(os, name), name)
    give = resharding._name_latest

    def give_latest(folder: Path, *, fsync: bool) -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(os, name, call)
            give(folder, fsync=fsync)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(resharding, "_name_latest", give_latest)
        code, lines = run(capsys, "reshard", GOLDEN, out, "--tp", 1, "--fsync")
    assert code == 2
    assert lines[0].startswith(f"error: {tmp_path}/.latest.txt")
    assert lines[0].endswith(": Input/output error")
    assert lines[1:] == [f"{out} is whole, and latest.txt beside it does not name it"]
    assert tree(out) == tree(tmp_path / "wanted")
    assert sorted(os.listdir(tmp_path)) == ["2", "wanted"]
