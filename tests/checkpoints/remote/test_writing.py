"""Writing checkpoints into a store: whole files, the mark last, and nothing left after an error."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

import nanotron_fast as nf
from nanotron_fast.checkpoints.remote import running
from nanotron_fast.errors import CheckpointError, DestinationError
from tests.checkpoints.remote.stores import contents, fail_first, put
from tests.modelzoo import make

URL = "faulty://bucket/out"
TP2 = nf.Topology(tp=2, pp=2)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    made = make("llama", num_hidden_layers=2)
    made.tokenizer = {"tokenizer.json": b"{}"}
    return made.save(tmp_path / "model", shards=3)


@pytest.mark.parametrize("group_bytes", [1, 60_000, 1 << 30])
def test_a_conversion_into_a_store_gives_the_same_bytes(
    faulty, temporary, model, tmp_path, monkeypatch, group_bytes
):
    monkeypatch.setattr(running, "GROUP_BYTES", group_bytes)
    report = nf.convert(model, URL, topology=TP2)
    nf.convert(model, tmp_path / "expected", topology=TP2)
    found, expected = contents(URL), contents(tmp_path / "expected")
    config = found.pop("config.yaml").decode()
    expected.pop("config.yaml")
    assert found == expected
    assert f"path: {URL}\n" in config
    assert "run: out\n" in config
    assert report.destination == URL
    assert not list(temporary.iterdir())


def test_from_a_store_to_a_store_and_back(faulty, temporary, model, tmp_path):
    put(model, "faulty://bucket/model")
    nf.convert("faulty://bucket/model", URL, topology=TP2)
    nf.convert(URL, "faulty://bucket/back", max_shard_size="100KB")
    assert nf.verify("faulty://bucket/back", model).equal
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("way", ["nanotron", "hf"])
def test_what_marks_a_checkpoint_is_written_last(faulty, temporary, model, tmp_path, way):
    if way == "hf":
        nf.convert(model, tmp_path / "nanotron", topology=TP2)
        model = tmp_path / "nanotron"
    written = []
    faulty.on_write = written.append
    nf.convert(model, URL, **({} if way == "nanotron" else {"max_shard_size": "100KB"}))
    names = [path.removeprefix("/bucket/out/") for path in written if "lock-" not in path]
    if way == "nanotron":
        assert names[-2:] == ["model_config.json", "checkpoint_metadata.json"]
    else:
        assert names[-2:] == ["config.json", "model.safetensors.index.json"]
    first_small = min(names.index(name) for name in names if not name.endswith(".safetensors"))
    assert not any(name.endswith(".safetensors") for name in names[first_small:])


def test_no_more_than_one_group_lies_on_the_disk(faulty, temporary, model, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "GROUP_BYTES", 100_000)
    held = []
    faulty.on_write = lambda _: held.append(
        sum(path.stat().st_blocks * 512 for path in temporary.rglob("*.safetensors"))
    )
    report = nf.convert(model, URL)
    assert max(held) < 100_000 + 10 * 8192 < report.plan.bytes_written


def test_writes_that_fail_are_tried_again(faulty, temporary, model, tmp_path):
    faulty.on_write = fail_first(5, lambda: OSError(errno.ECONNRESET, "reset by peer"))
    nf.convert(model, URL)
    assert nf.verify(URL, model).equal


@pytest.mark.parametrize("fails_at", ["lm_head", "model_config.json", "checkpoint_metadata.json"])
def test_what_was_written_is_removed_after_an_error(faulty, temporary, model, tmp_path, fails_at):
    def fails(path):
        if fails_at in path:
            raise OSError(errno.EIO, "the store is full")

    faulty.on_write = fails
    with pytest.raises(OSError, match=r"cannot be written in 6 tries: .*is full") as caught:
        nf.convert(model, URL)
    assert caught.value.filename.startswith(f"{URL}/")
    assert fails_at in caught.value.filename
    assert contents(URL) == {}
    assert not list(temporary.iterdir())


def test_what_cannot_be_removed_is_named(faulty, temporary, model, tmp_path):
    def fails(path):
        if path.endswith("checkpoint_metadata.json"):
            raise OSError(errno.EIO, "the store is full")

    def stays(path):
        if "embed" in path:
            raise PermissionError(errno.EACCES, "Access Denied")

    faulty.on_write, faulty.on_remove = fails, stays
    with pytest.raises(OSError, match=r"these are left: model/model/token_position_embeddings/"):
        nf.convert(model, URL)
    assert [name for name in contents(URL) if "lock-" not in name] == [
        "model/model/token_position_embeddings/pp_block/token_embedding/model_weight_pp-rank-0-of-1"
        "_tp-rank-0-of-1.safetensors"
    ]
    # What a run has left is known to be no checkpoint of anybody's.
    faulty.on_write = faulty.on_remove = None
    with pytest.raises(DestinationError, match="--overwrite replaces what is there"):
        nf.convert(model, URL)
    nf.convert(model, URL, overwrite=True)
    assert nf.verify(URL, model).equal
    assert not [name for name in contents(URL) if "lock-" in name]


def test_what_is_there_stays_without_overwrite(faulty, temporary, model, tmp_path):
    put(make("llama", seed=1, num_hidden_layers=2).save(tmp_path / "old"), URL)
    before = contents(URL)
    with pytest.raises(DestinationError, match="--overwrite replaces what is there"):
        nf.convert(model, URL)
    assert contents(URL) == before


def test_overwrite_replaces_a_checkpoint(faulty, temporary, model, tmp_path):
    old = make("llama", seed=1, num_hidden_layers=3).save(tmp_path / "old")
    nf.convert(old, URL, topology=TP2)
    nf.convert(model, URL, overwrite=True)
    assert nf.verify(URL, model).equal
    assert not [name for name in contents(URL) if "tp-rank-1-of-2" in name]


def test_overwrite_leaves_what_is_no_checkpoint(faulty, temporary, model, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("long")
    put(tmp_path / "thesis", URL)
    with pytest.raises(DestinationError, match=r"there is more in it: chapter\.tex"):
        nf.convert(model, URL, overwrite=True)
    assert list(contents(URL)) == ["chapter.tex"]


def test_a_failed_overwrite_says_what_is_lost(faulty, temporary, model, tmp_path):
    nf.convert(model, URL)

    def fails(path):
        if "lm_head" in path:
            raise PermissionError(errno.EACCES, "Access Denied")

    faulty.on_write = fails
    with pytest.raises(PermissionError, match="not whole any more"):
        nf.convert(model, URL, overwrite=True)
    with pytest.raises(CheckpointError):
        nf.inspect(URL)
    faulty.on_write = None
    nf.convert(model, URL, overwrite=True)
    assert nf.verify(URL, model).equal
    assert not [name for name in contents(URL) if "lock-" in name]


def test_the_source_is_not_overwritten(faulty, temporary, model, tmp_path):
    put(model, URL)
    before = contents(URL)
    with pytest.raises(DestinationError, match="the destination is the source"):
        nf.convert(URL, URL, overwrite=True)
    assert contents(URL) == before


def test_a_bad_model_writes_nothing(faulty, temporary, model, tmp_path):
    next(iter(sorted(model.glob("*.safetensors")))).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        nf.convert(model, URL)
    assert contents(URL) == {}
