"""Small files of a source: a run is of what they were when it was planned, or is no run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast as nf
from nanotron_fast.checkpoints import carrying_out, checking
from nanotron_fast.checkpoints.remote import upload
from nanotron_fast.checkpoints.reshard import reshard
from nanotron_fast.errors import CheckpointError, DestinationError
from nanotron_fast.moves import engine
from tests.checkpoints.test_claims import while_running
from tests.checkpoints.test_resume import TP2, names, stopped
from tests.modelzoo import make

GOLDEN = Path(__file__).parents[1] / "golden" / "training" / "llama_tied_tp2_zero0"
SMALL = ("config.json", "generation_config.json", "tokenizer.json", "template.jinja")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = make("llama", num_hidden_layers=1)
    model.tokenizer = {"tokenizer.json": b"{}", "template.jinja": b"{{ messages }}"}
    root = model.save(tmp_path / "source")
    (root / "generation_config.json").write_text('{"eos_token_id": 2}')
    return root


def change(path: Path) -> None:
    """Another value of as many bytes, written in place."""
    data = path.read_bytes()
    if path.name == "config.json":
        config = json.loads(data)
        config["rope_theta"] = config.get("rope_theta", 10000.0) + 1
        path.write_text(json.dumps(config))
    elif path.suffix == ".json":
        path.write_bytes(data.replace(b"2", b"3") + b" ")
    else:
        path.write_bytes(data.replace(b"m", b"n") + b" ")


@pytest.mark.parametrize("name", SMALL)
def test_one_that_changes(name: str, source: Path, tmp_path: Path) -> None:
    """While a run goes on, and between one that ended early and the one that goes on with it."""
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=rf"source/{name}: it has changed while it was read"):
        while_running(lambda: change(source / name), source, out)
    assert names(tmp_path) == ["source"]
    stopped(source, out, 3)
    change(source / name)
    refusal = rf"another conversion: \S*source/{name} (holds something else|has [\d,]+ bytes) now"
    with pytest.raises(DestinationError, match=refusal):
        nf.convert(source, out, topology=TP2, resume=True)
    nf.convert(source, out, topology=TP2, overwrite_partial=True)
    assert names(tmp_path) == ["out", "source"]


def test_one_that_is_removed(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"source/config.json: it has been removed while"):
        while_running((source / "config.json").unlink, source, tmp_path / "out")
    assert names(tmp_path) == ["source"]


def test_one_that_is_written_anew_as_it_was(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def copy() -> None:
        for name in SMALL:
            (tmp_path / "new").write_bytes((source / name).read_bytes())
            (tmp_path / "new").rename(source / name)

    stopped(source, out, 3)
    copy()
    while_running(copy, source, out, resume=True)
    assert nf.verify(source, out).equal


@pytest.mark.parametrize("is_in_store", [False, True], ids=["to a disk", "to a store"])
def test_one_that_is_shorter_for_a_moment(
    is_in_store: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after it holds the same: `cp` empties what it copies to."""
    path = source / "template.jinja"
    whole = path.read_bytes()
    module = upload if is_in_store else carrying_out
    copy = module.copy_file

    def meanwhile(of: Path, *args: Any, **given: Any) -> None:
        path.write_bytes(whole[:3])
        try:
            copy(of, *args, **given)
        finally:
            path.write_bytes(whole)

    monkeypatch.setattr(module, "copy_file", meanwhile)
    out = "memory://bucket/out" if is_in_store else tmp_path / "out"
    message = rf"{path}: it has changed while it was read \(14 bytes then, 3 now\)"
    with pytest.raises(CheckpointError, match=message):
        nf.convert(source, out)
    assert names(tmp_path) == ["source"]


def test_those_of_a_share(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    nf.convert(source, out, topology=TP2, share=(1, 2))
    change(source / "config.json")
    nf.convert(source, out, topology=TP2, share=(2, 2), overwrite_partial=True)
    assert len(names(tmp_path)) == 2
    nf.convert(source, out, topology=TP2, share=(1, 2))
    nf.convert(source, out, topology=TP2, finish=True)


def test_those_from_elsewhere(source: Path, tmp_path: Path) -> None:
    """A tokenizer of another folder, and the configuration that Nanotron's training names."""
    other = make("llama", num_hidden_layers=1)
    other.tokenizer = {"tokenizer.json": b"{}"}
    tokenizer = other.save(tmp_path / "other") / "tokenizer.json"
    with pytest.raises(CheckpointError, match=r"other/tokenizer.json: it has changed"):
        while_running(
            lambda: change(tokenizer), source, tmp_path / "out", tokenizer=tokenizer.parent
        )


@pytest.mark.parametrize(
    "name",
    ["checkpoint_metadata.json", "config.yaml", "lr_scheduler", "random", "optimizer_config.json"],
)
def test_those_of_a_training(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "run" / "2"
    source.parent.mkdir()
    os.system(f"cp -r {GOLDEN}/2 {GOLDEN}/latest.txt {source.parent}")
    path = next(path for path in sorted(source.rglob("*")) if name in str(path) and path.is_file())
    execute = engine.execute

    def late(*args: Any, **given: Any) -> Any:
        result = execute(*args, **given)
        work()
        return result

    monkeypatch.setattr(engine, "execute", late)
    before = path.read_bytes()
    work: Callable[[], Any] = lambda: path.write_bytes(before + b" ")  # noqa: E731
    with pytest.raises(CheckpointError, match=rf"{path}: it has changed while it was read"):
        reshard(source.parent, tmp_path / "out", tp=1)
    assert names(tmp_path) == ["run"]
    path.write_bytes(before)
    # That there is a later step says nothing of this one.
    work = lambda: (source.parent / "latest.txt").write_text("3")  # noqa: E731
    reshard(source.parent, tmp_path / "out", tp=1)


def test_processes_that_see_other_small_files(source: Path, tmp_path: Path) -> None:
    from nanotron_fast.checkpoints.fingerprint import made_by, states_of
    from nanotron_fast.checkpoints.processes import Processes

    first = nf.plan(source, tmp_path / "out")
    made = made_by(first, states_of(first))
    change(source / "config.json")
    second = nf.plan(source, tmp_path / "out")
    other = made_by(second, states_of(second))

    class Two(Processes):
        world_size = 2

        def gather(self, value: Any) -> list[Any]:
            is_digest = isinstance(value, tuple)
            return [value, (other.digest, value[1]) if is_digest else other]

    message = r"source/config.json (holds something else|has \d+ bytes) in process 0"
    with pytest.raises(CheckpointError, match=message):
        checking.check_same(Two(), made)
