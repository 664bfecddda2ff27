"""Several runs onto one URL: one writes, and what it does not know it neither takes nor removes."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import pytest

import nanotron_fast as nf
from nanotron_fast.checkpoints.owners import Owner
from nanotron_fast.checkpoints.remote import claim
from nanotron_fast.checkpoints.remote.claim import StoreClaim, is_claim
from nanotron_fast.checkpoints.remote.store import Store
from nanotron_fast.checkpoints.remote.upload import Upload
from nanotron_fast.errors import CheckpointError, DestinationError
from tests.checkpoints.remote.stores import contents
from tests.checkpoints.remote.stores import put as copy
from tests.modelzoo import make

URL = "faulty://bucket/out"
LOCK = "/bucket/out/.nanotron_fast.lock-0a1b2c3d"
ELSEWHERE = replace(Owner.this("0a1b2c3d"), host="node7", boot="b")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make("llama", num_hidden_layers=1).save(tmp_path / "model")


class Killed(BaseException):
    """SIGKILL: nothing is done any more."""


def kill() -> None:
    raise Killed


def files() -> dict[str, bytes]:
    return {name: data for name, data in contents(URL).items() if not is_claim(name)}


def put(faulty, owner: Owner | None, silent_seconds: float, state: str = "writes") -> None:
    """The object of another run, which was written so long ago."""
    document = {"owner": asdict(owner) if owner else None, "state": state, "since": 1.0}
    faulty().pipe_file(LOCK, json.dumps(document).encode() if owner else b"")
    faulty.store[LOCK].created -= timedelta(seconds=silent_seconds)


def at(faulty, part: str, work) -> None:
    """Does work once, before the first write of a file whose name has that part."""

    def once(path: str) -> None:
        if part in path and faulty.on_write is not None:
            faulty.on_write = None
            work()

    faulty.on_write = once


@pytest.mark.parametrize("when", ["lm_head", "model_config.json"])
def test_a_second_run_is_refused(faulty, model, when):
    refused = []

    def second() -> None:
        before = set(files())  # other threads go on writing
        message = f"{URL}: another run is writing to it: process {os.getpid()} on"
        for overwrite in (False, True):
            with pytest.raises(DestinationError, match=message):
                nf.convert(model, URL, overwrite=overwrite)
        assert before <= set(files())
        refused.append(True)

    at(faulty, when, second)
    nf.convert(model, URL)
    assert refused
    assert nf.verify(URL, model).equal
    assert not any(map(is_claim, contents(URL)))


@pytest.mark.parametrize(
    ("owner", "silent_seconds", "state", "is_alive"),
    [
        (ELSEWHERE, 10, "writes", True),
        (ELSEWHERE, claim.DEAD_AFTER_SECONDS + 10, "writes", False),
        (ELSEWHERE, 10, "ended", False),
        (None, 10, "", True),
        (None, claim.DEAD_AFTER_SECONDS + 10, "", False),
        (Owner.this("0a1b2c3d"), 10_000, "writes", True),
        (replace(Owner.this("0a1b2c3d"), ticks=1), 0, "writes", False),
    ],
)
def test_whether_another_lives(faulty, model, monkeypatch, owner, silent_seconds, state, is_alive):
    put(faulty, owner, silent_seconds, state)
    # This machine's clock says nothing about it.
    monkeypatch.setattr(time, "time", lambda: 1e6)
    if is_alive:
        with pytest.raises(DestinationError, match="counts as dead when nobody has written it for"):
            nf.convert(model, URL)
        assert [*contents(URL)] == [LOCK.rpartition("/")[2]]
    else:
        nf.convert(model, URL)
        assert nf.verify(URL, model).equal
        assert not any(map(is_claim, contents(URL)))


def test_of_many_that_begin_at_once_one_goes_on(faulty, monkeypatch):
    """Whatever the order in which they write and list."""
    monkeypatch.setattr(claim, "_POLL_SECONDS", 0.002)
    for number in range(10):
        url = f"{URL}{number}"
        faulty.on_write = lambda _: time.sleep(random.uniform(0, 0.004))
        claims = [StoreClaim(Store.at(url)) for _ in range(5)]
        taken, refused = [], []

        def run(each: StoreClaim, taken=taken, refused=refused) -> None:
            try:
                each.acquire()
                taken.append(each)
            except DestinationError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=run, args=(each,)) for each in claims]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(taken) == 1, (taken, refused)
        assert len(refused) == 4
        taken[0].check()
        taken[0].release()
        assert contents(url) == {}


def test_it_is_written_again_and_again(faulty, monkeypatch):
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.01)
    written = []
    faulty.on_write = written.append
    held = StoreClaim(Store.at(URL))
    held.acquire()
    deadline = time.monotonic() + 20
    while len(written) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    held.release()
    num_written = len(written)
    assert num_written >= 5
    time.sleep(0.05)
    assert len(written) == num_written
    assert contents(URL) == {}


@pytest.mark.parametrize("is_removed", [False, True])
def test_a_run_that_was_counted_as_dead_ends(faulty, model, is_removed):
    """It removes nothing of the other one's."""

    def take() -> None:
        for path in [path for path in faulty.store if "lock-" in path]:
            if is_removed:
                faulty().rm_file(path)
        document = {"owner": asdict(ELSEWHERE), "state": "writes", "since": 1e12}
        faulty().pipe_file(LOCK, json.dumps(document).encode())
        faulty().pipe_file("/bucket/out/model/model/theirs.safetensors", b"theirs")
        faulty().pipe_file(embedding, b"theirs")

    embedding = next(
        f"/bucket/out/{each.path}"
        for each in nf.plan(model, URL).transfer.outputs
        if "embed" in each.path
    )
    at(faulty, "config.yaml", take)
    message = "lock-.* is not there any more" if is_removed else "node7, .*which ends"
    with pytest.raises(DestinationError, match=message):
        nf.convert(model, URL)
    names = {embedding.removeprefix("/bucket/out/"), "model/model/theirs.safetensors"}
    assert set(files()) == names
    assert set(files().values()) == {b"theirs"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_something_else_writes_meanwhile(faulty, model, overwrite):
    if overwrite:
        nf.convert(model, URL, topology=nf.Topology(tp=2))
    path = "/bucket/out/model/model/theirs.safetensors"
    at(faulty, "config.yaml", lambda: faulty().pipe_file(path, b"theirs"))
    with pytest.raises(DestinationError, match=r"theirs.safetensors was written by something"):
        nf.convert(model, URL, overwrite=overwrite)
    with pytest.raises(CheckpointError):
        nf.inspect(URL)
    assert files()["model/model/theirs.safetensors"] == b"theirs"
    assert overwrite or len(files()) == 1


def test_what_something_else_replaces_or_removes_meanwhile(faulty, model):
    outputs = [f"/bucket/out/{each.path}" for each in nf.plan(model, URL).transfer.outputs]
    data = b"x" * 999
    at(faulty, "config.yaml", lambda: faulty().pipe_file(outputs[0], data))
    with pytest.raises(DestinationError, match=r"safetensors was written by something else"):
        nf.convert(model, URL)
    assert [*files().values()] == [data]
    faulty().rm_file(outputs[0])
    at(faulty, "config.yaml", lambda: faulty().rm_file(outputs[0]))
    with pytest.raises(DestinationError, match=r"of this run is not there any more"):
        nf.convert(model, URL)
    assert contents(URL) == {}


def test_a_killed_run_s_files_are_overwritten(faulty, model, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Upload, "abort", lambda self, error: self._claim._is_over.set())
        at(faulty, "config.yaml", kill)
        with pytest.raises(Killed):
            nf.convert(model, URL, topology=nf.Topology(tp=2))
    lock = next(path for path in faulty.store if "lock-" in path)
    document = json.loads(faulty.store[lock].getvalue())
    document["owner"]["ticks"] = 1
    faulty().pipe_file(lock, json.dumps(document).encode())
    with pytest.raises(DestinationError, match="it is not empty; --overwrite replaces what is"):
        nf.convert(model, URL)
    nf.convert(model, URL, overwrite=True)
    assert nf.verify(URL, model).equal
    assert not [name for name in contents(URL) if is_claim(name) or "of-2" in name]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_source_that_changes_meanwhile(faulty, model, name):
    at(
        faulty,
        "config.yaml",
        lambda: (model / name).write_bytes((model / name).read_bytes() + b" "),
    )
    with pytest.raises(CheckpointError, match=rf"model/{name}: it has changed while it was read"):
        nf.convert(model, URL)
    assert contents(URL) == {}


@pytest.mark.parametrize("change", ["contents", "none", "removed"])
def test_a_configuration_in_a_store_that_changes_meanwhile(faulty, temporary, model, change):
    """The store says no more of a file than when it was written, which listings may round."""
    source = "faulty://bucket/model"
    copy(model, source)
    path = "/bucket/model/config.json"
    data = faulty.store[path].getvalue()

    def work() -> None:
        if change == "removed":
            faulty().rm_file(path)
        else:
            faulty().pipe_file(path, data.replace(b"silu", b"gelu") if change[0] == "c" else data)

    at(faulty, "lm_head", work)
    if change == "none":
        nf.convert(source, URL)
        assert nf.verify(URL, model).equal
    else:
        message = rf"{source}/config.json: it has (changed|been removed) since the conversion"
        with pytest.raises(CheckpointError, match=message):
            nf.convert(source, URL)
        assert contents(URL) == {}
