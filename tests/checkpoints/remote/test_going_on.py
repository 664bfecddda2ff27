"""Ends before the time: what is left, and going on with it from a store."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast as nf
from nanotron_fast.checkpoints.processes import PeerGone, Processes
from nanotron_fast.checkpoints.remote import mirror, running
from nanotron_fast.errors import ConfigError, DestinationError
from tests.checkpoints.remote.stores import contents, put
from tests.modelzoo import make

URL, OUT = "faulty://bucket/llama", "faulty://bucket/out"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make("llama", num_hidden_layers=2).save(tmp_path / "model", shards=3)


def fails_half_way() -> Callable[[str, int, int], None]:
    """Some reads of tensors go well, and all others fail."""
    left = [12]

    def fail(path: str, begin: int, end: int) -> None:
        left[0] -= begin > 0
        if begin > 0 and left[0] < 0:
            raise OSError(errno.EIO, "the store is on fire")

    return fail


def test_a_run_goes_on_with_what_it_had_finished(faulty, temporary, model, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "GROUP_BYTES", 20_000)
    put(model, URL)
    faulty.on_read = fails_half_way()
    with pytest.raises(OSError, match="on fire"):
        nf.convert(URL, tmp_path / "out")
    with pytest.raises(DestinationError, match="--resume"):
        nf.convert(URL, tmp_path / "out")
    faulty.on_read = None
    faulty.reads.clear()
    nf.convert(URL, tmp_path / "out", resume=True)
    assert nf.verify(tmp_path / "out", model).equal
    again = sum(end - begin for _, begin, end in faulty.reads if begin > 0)
    assert 0 < again < 0.8 * sum(path.stat().st_size for path in model.glob("*.safetensors"))


def test_a_source_that_is_another_by_now_is_not_gone_on_with(
    faulty, temporary, model, tmp_path, monkeypatch
):
    monkeypatch.setattr(running, "GROUP_BYTES", 20_000)
    put(model, URL)
    faulty.on_read = fails_half_way()
    with pytest.raises(OSError, match="on fire"):
        nf.convert(URL, tmp_path / "out")
    faulty.on_read = None
    put(make("llama", seed=1, num_hidden_layers=2).save(tmp_path / "other", shards=3), URL)
    with pytest.raises(DestinationError, match=f"{URL}/model-0000"):
        nf.convert(URL, tmp_path / "out", resume=True)


@pytest.mark.parametrize(
    "wish",
    [
        {"resume": True},
        {"overwrite_partial": True},
        {"share": (1, 2)},
        {"finish": True},
        {"manifest": True},
        {"fsync": True},
        {"io": "direct"},
    ],
)
def test_a_store_takes_a_conversion_as_a_whole(faulty, temporary, model, wish):
    with pytest.raises(ConfigError, match="it is for a directory, and"):
        nf.convert(model, OUT, **wish)


class Together(Processes):
    """One of two processes, each a thread here."""

    world_size = 2

    def __init__(self, rank: int, barrier: threading.Barrier, told: dict[int, Any]) -> None:
        self.rank, self._barrier, self._told = rank, barrier, told

    @contextmanager
    def step(self) -> Iterator[None]:
        yield
        self._barrier.wait(60)

    def gather(self, value: Any) -> list[Any]:
        self._told[self.rank] = value
        self._barrier.wait(60)
        values = [self._told[rank] for rank in range(self.world_size)]
        self._barrier.wait(60)
        return values


def test_processes_upload_their_shares(faulty, temporary, model):
    barrier, told = threading.Barrier(2), {}
    with ThreadPoolExecutor(2) as threads:
        runs = [
            threads.submit(nf.convert, model, OUT, processes=Together(rank, barrier, told))
            for rank in range(2)
        ]
        for run in runs:
            run.result()
    first, second = (set(told[rank]) for rank in range(2))
    assert first
    assert second
    assert not first & second
    assert nf.verify(OUT, model).equal


class Widowed(Processes):
    """The first of two processes, of which the other is gone once tensors are uploaded."""

    world_size = 2

    def gather(self, value: Any) -> list[Any]:
        if isinstance(value, dict):
            raise PeerGone("another process is gone")
        return [value] * 2


def test_what_a_process_that_is_gone_has_uploaded_is_removed(faulty, temporary, model):
    fs = faulty()
    head = "model/model/lm_head/pp_block/model_weight_pp-rank-0-of-1_tp-rank-0-of-1.safetensors"
    theirs, foreign = f"{OUT}/{head}", f"{OUT}/notes.txt"

    def upload_theirs(_: str) -> None:
        faulty.on_write = None
        fs.pipe_file(theirs, b"begun")
        fs.pipe_file(foreign, b"somebody else's")

    faulty.on_write = lambda path: upload_theirs(path) if path.endswith(".safetensors") else None
    with pytest.raises(PeerGone, match=r"another process is gone$"):
        nf.convert(model, OUT, processes=Widowed())
    names = [name for name in contents(OUT) if "lock-" not in name]
    assert names == ["notes.txt"]
    fs.rm_file(foreign)
    # Of one that may live on elsewhere the next run learns by what was left of the claim.
    nf.convert(model, OUT)
    assert nf.verify(OUT, model).equal
    assert not [name for name in contents(OUT) if "lock-" in name]


def test_mirrors_of_one_version_look_the_same(faulty, temporary, model):
    put(model, URL)
    first, second = mirror.mirror(URL), mirror.mirror(URL)
    name = "model-00001-of-00003.safetensors"
    assert (first / name).stat().st_mtime_ns == (second / name).stat().st_mtime_ns
    faulty().pipe_file(f"{URL}/{name}", (model / name).read_bytes())
    third = mirror.mirror(URL)
    assert (first / name).stat().st_mtime_ns != (third / name).stat().st_mtime_ns
    assert mirror.shown(f"{first / name}: and {second}") == f"{URL}/{name}: and {URL}"
    for root in (first, second, third):
        mirror._open[root].close()
    assert not list(temporary.iterdir())


PROGRAM = """
import sys, time
import fsspec
from tests.checkpoints.remote.stores import FaultyFileSystem, put
from pathlib import Path
fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
put(Path(sys.argv[1]), "faulty://bucket/llama")

def hangs(path, begin, end):
    if begin > 0:
        print("reading", flush=True)
        time.sleep(60)

FaultyFileSystem.on_read = hangs
sys.argv = ["nanotron-fast", "convert", "faulty://bucket/llama", sys.argv[2]]
from nanotron_fast.__main__ import main
main()
"""


def test_a_signal_ends_a_run_that_waits_for_its_store(temporary, model, tmp_path):
    root = Path(__file__).parents[3]
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(root)}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(model), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 143, errors
    assert "interrupted by SIGTERM" in errors
    assert time.monotonic() - started < 3
    assert not (tmp_path / "out").exists()
    assert not list(temporary.iterdir())
