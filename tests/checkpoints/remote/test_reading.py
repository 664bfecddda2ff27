"""Reading checkpoints out of a store: the same bytes, by ranges, in bounded room, or one error."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import nanotron_fast as nf
from nanotron_fast.checkpoints.remote import mirror, running, store, urls
from nanotron_fast.cli.commands import app
from nanotron_fast.errors import (
    CheckpointError,
    ConfigError,
    DestinationError,
    MissingPackageError,
)
from nanotron_fast.moves import engine
from tests.checkpoints.remote.stores import contents, fail_first, put, slow
from tests.fp8 import quantised
from tests.modelzoo import make

TP2 = nf.Topology(tp=2, pp=2)
URL = "faulty://bucket/models/llama"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    made = make("llama", num_hidden_layers=2)
    made.tokenizer = {"tokenizer.json": b"{}", "README.md": b"# card"}
    return made.save(tmp_path / "model", shards=3)


def without_config(folder: Path) -> dict[str, bytes]:
    """config.yaml names the destination."""
    return {name: data for name, data in contents(folder).items() if name != "config.yaml"}


@pytest.mark.parametrize("group_bytes", [1, 50_000, 1 << 30])
def test_a_conversion_out_of_a_store_gives_the_same_bytes(
    faulty, temporary, model, tmp_path, monkeypatch, group_bytes
):
    monkeypatch.setattr(running, "GROUP_BYTES", group_bytes)
    put(model, URL)
    report = nf.convert(URL, tmp_path / "out", topology=TP2)
    nf.convert(model, tmp_path / "expected", topology=TP2)
    assert without_config(tmp_path / "out") == without_config(tmp_path / "expected")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert report.plan.bytes_written
    assert not list(temporary.iterdir())


def test_a_nanotron_checkpoint_comes_back_out_of_a_store(faulty, temporary, model, tmp_path):
    nf.convert(model, tmp_path / "there", topology=TP2)
    put(tmp_path / "there", URL)
    nf.convert(URL, tmp_path / "back")
    assert nf.verify(tmp_path / "back", model).equal
    assert not list(temporary.iterdir())


def test_the_latest_step_of_a_run_is_read(faulty, temporary, model, tmp_path):
    nf.convert(model, tmp_path / "run" / "20")
    (tmp_path / "run" / "latest.txt").write_text("20\n")
    put(tmp_path / "run", URL)
    assert nf.inspect(URL).path == f"{URL}/20"
    nf.convert(URL, tmp_path / "back")
    assert nf.verify(tmp_path / "back", model).equal


def test_reads_are_ranges_of_bounded_size_and_number(
    faulty, temporary, model, tmp_path, monkeypatch
):
    monkeypatch.setattr(mirror, "BLOCK_BYTES", 4096)
    faulty.on_read = slow(0.001)
    put(model, URL)
    nf.convert(URL, tmp_path / "out")
    tensors = [read for read in faulty.reads if read[0].endswith(".safetensors")]
    assert max(end - begin for _, begin, end in tensors) <= 4096
    total = sum(end - begin for _, begin, end in tensors)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert total < 1.2 * size
    assert 1 < faulty.most_at_once <= store.NUM_AT_A_TIME


def test_no_more_than_one_group_lies_on_the_disk(faulty, temporary, model, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "GROUP_BYTES", 30_000)
    held = []
    execute = engine.execute

    def watching(*args, **more):
        held.append(sum(path.stat().st_blocks * 512 for path in temporary.rglob("*.safetensors")))
        execute(*args, **more)

    monkeypatch.setattr(engine, "execute", watching)
    put(model, URL)
    nf.convert(URL, tmp_path / "out")
    total = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert len(held) > 5
    # Blocks of the file system round every range up.
    assert max(held) < 30_000 + 20 * 4096 < total


def test_reads_that_fail_are_tried_again(faulty, temporary, model, tmp_path):
    put(model, URL)
    faulty.on_read = fail_first(5, lambda: OSError(errno.ECONNRESET, "reset by peer"))
    nf.convert(URL, tmp_path / "out")
    assert nf.verify(tmp_path / "out", model).equal


def test_a_body_that_ends_in_the_middle_is_read_again(faulty, temporary, model, tmp_path):
    put(model, URL)
    cut = {}

    def ends_early(path, begin, end):
        if path.endswith(".safetensors") and cut.setdefault((path, begin), 0) < 2:
            cut[path, begin] += 1
            return faulty.store[path].getvalue()[begin : (begin + end) // 2]
        return None

    faulty.on_read = ends_early
    nf.convert(URL, tmp_path / "out")
    assert nf.verify(tmp_path / "out", model).equal
    assert cut


def test_what_fails_for_ever_is_an_error_that_names_it(faulty, temporary, model, tmp_path):
    put(model, URL)

    def fails(path, begin, end):
        # The header of the second file can be read, and its tensors cannot.
        if "00002-of" in path and begin > 0:
            raise OSError(errno.EIO, "the store is on fire")

    faulty.on_read = fails
    with pytest.raises(OSError, match=r"cannot be read in 6 tries: .*on fire") as caught:
        nf.convert(URL, tmp_path / "out")
    assert caught.value.filename == f"{URL}/model-00002-of-00003.safetensors"
    assert not (tmp_path / "out").exists()
    assert not list(temporary.iterdir())


def test_what_may_not_be_read_is_not_tried_again(faulty, temporary, model, tmp_path):
    put(model, URL)

    def denied(path, begin, end):
        if path.endswith(".safetensors"):
            raise PermissionError(errno.EACCES, "Access Denied")

    faulty.on_read = denied
    with pytest.raises(PermissionError, match="Access Denied") as caught:
        nf.convert(URL, tmp_path / "out")
    assert caught.value.filename.startswith(f"{URL}/model-")
    reads = [path for path, *_ in faulty.reads if path.endswith(".safetensors")]
    assert len(reads) == len(set(reads))


class NoCredentialsError(Exception):
    """As botocore's."""


class RefreshError(Exception):
    """As Google's."""


def error_of(cause: Exception | None = None, **attributes: object) -> Exception:
    """As a client raises one: with what HTTP said, or on top of another."""
    error = RuntimeError("the store says no")
    for name, value in attributes.items():
        setattr(error, name, value)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        NoCredentialsError("Unable to locate credentials"),
        RefreshError("Reauthentication is needed"),
        error_of(status=401),
        error_of(code=403),
        error_of(response=SimpleNamespace(status_code=403)),
        error_of(response={"ResponseMetadata": {"HTTPStatusCode": 403}}),
        error_of(cause=PermissionError("Forbidden")),
        error_of(cause=error_of(cause=error_of(status_code=401))),
    ],
)
@pytest.mark.parametrize("call", ["listing", "reading"])
def test_a_key_that_is_missing_is_not_looked_for_again(
    faulty, temporary, model, tmp_path, monkeypatch, capsys, error, call
):
    put(model, URL)
    calls = []

    def denied(*given, **_):
        calls.append(given)
        raise error

    if call == "reading":
        faulty.on_read = denied
    else:
        monkeypatch.setattr(faulty, "find", denied)
    with pytest.raises(SystemExit) as stopped:
        app(["convert", URL, str(tmp_path / "out")], standalone_mode=True)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"error: {URL}")
    assert said.endswith(f": a key is missing or not accepted: {error}\n")
    assert "tries" not in said
    assert len(calls) == len(set(calls))
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("attributes", [{"status": 503}, {"code": 429}, {"response": {}}, {}])
def test_what_passes_is_tried_again(faulty, temporary, model, tmp_path, attributes):
    put(model, URL)
    faulty.on_read = lambda *_: (_ for _ in ()).throw(error_of(**attributes))
    with pytest.raises(OSError, match="cannot be read in 6 tries: the store says no"):
        nf.convert(URL, tmp_path / "out")


@pytest.mark.parametrize("is_removed", [False, True])
def test_a_source_that_changes_meanwhile_is_an_error(
    faulty, temporary, model, tmp_path, is_removed
):
    put(model, URL)
    name = next(path for path in faulty.store if "00003-of" in path)

    def changes(path, begin, end):
        if path == name and begin > 0:
            data = faulty.store[name].getvalue()
            faulty.on_read = None
            fs = faulty()
            if is_removed:
                fs.rm_file(name)
                return data[begin:end]
            fs.pipe_file(name, data[:-1] + b"x")
        return None

    faulty.on_read = changes
    problem = "it has been removed since" if is_removed else "it has changed since"
    with pytest.raises(CheckpointError, match=problem) as caught:
        nf.convert(URL, tmp_path / "out")
    assert str(caught.value).startswith(f"{URL}/model-00003-of-00003.safetensors: ")
    assert not (tmp_path / "out").exists()


def test_errors_of_planning_name_the_url(faulty, temporary, model, tmp_path):
    (model / "config.json").write_text("{")
    put(model, URL)
    with pytest.raises(CheckpointError) as caught:
        nf.convert(URL, tmp_path / "out")
    assert str(caught.value).startswith(f"{URL}/config.json: ")


def test_a_truncated_file_is_refused_as_on_a_disk(faulty, temporary, model, tmp_path):
    first = next(iter(sorted(model.glob("*.safetensors"))))
    os.truncate(first, first.stat().st_size - 10)
    put(model, URL)
    with pytest.raises(CheckpointError, match="truncated") as caught:
        nf.inspect(URL)
    assert str(caught.value).startswith(f"{URL}/{first.name}: ")


def test_verify_and_inspect_take_urls(faulty, temporary, model, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "GROUP_BYTES", 30_000)
    put(model, URL)
    nf.convert(model, tmp_path / "out", topology=TP2)
    put(tmp_path / "out", f"{URL}-nanotron")
    assert nf.verify(URL, f"{URL}-nanotron").equal
    found = nf.inspect(URL)
    assert (found.path, found.family, found.tensor_files) == (URL, "llama", 3)
    path = next(each for each in faulty.store if "nanotron" in each and "lm_head" in each)
    data = bytearray(faulty.store[path].getvalue())
    data[-2] ^= 1
    faulty().pipe_file(path, bytes(data))
    result = nf.verify(URL, f"{URL}-nanotron")
    assert [each.name for each in result.differing] == ["lm_head.weight"]
    assert f"of {URL}-nanotron/model/" in result.differing[0].reason
    assert not list(temporary.iterdir())


def test_tied_copies_are_compared_in_a_store_too(faulty, temporary, tmp_path):
    made = make("llama", tie_word_embeddings=True, num_hidden_layers=2)
    embedding = made.tensors["model.embed_tokens.weight"]
    other = embedding._replace(data=bytes(len(embedding.data)))
    put(made.save(tmp_path / "model", extra={"lm_head.weight": other}), URL)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from"):
        nf.convert(URL, tmp_path / "out")
    put(made.save(tmp_path / "same", extra={"lm_head.weight": embedding}), f"{URL}-same")
    nf.convert(f"{URL}-same", tmp_path / "out")


def test_two_sets_of_weights_are_left_to_a_disk(faulty, temporary, model, tmp_path):
    make("llama", num_hidden_layers=2).save(model)
    put(model, URL)
    with pytest.raises(CheckpointError, match="lie side by side"):
        nf.convert(URL, tmp_path / "out")


def test_a_tokenizer_comes_from_a_store(faulty, temporary, model, tmp_path):
    put(model, URL)
    other = make("llama", num_hidden_layers=2).save(tmp_path / "other")
    nf.convert(other, tmp_path / "out", tokenizer=URL)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"
    assert not list(temporary.iterdir())


def test_a_disk_that_is_too_small_is_said_before_it_is_filled(
    faulty, temporary, model, tmp_path, monkeypatch
):
    put(model, URL)
    room = SimpleNamespace(total=1000, free=10)
    monkeypatch.setattr(running.shutil, "disk_usage", lambda _: room)
    with pytest.raises(DestinationError, match="TMPDIR names another place"):
        nf.convert(URL, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    room.total = room.free = 0
    nf.convert(URL, tmp_path / "out")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nothing://bucket/model", "nothing"),
        ("faulty://", "it names no folder"),
        ("faulty://bucket/absent", "there is nothing"),
    ],
)
def test_what_is_not_there_is_said(faulty, temporary, url, message):
    with pytest.raises((CheckpointError, ConfigError), match=message):
        nf.inspect(url)


def test_the_package_to_install_is_named(temporary, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    # Where an earlier test has had it imported.
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(MissingPackageError, match=r"pip install 'nanotron_fast\[s3\]'"):
        nf.inspect("s3://bucket/model")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(MissingPackageError, match="pip install gcsfs"):
        nf.inspect("gs://bucket/model")


def test_passwords_are_not_shown():
    assert urls.without_password("sftp://me:secret@host/model/") == "sftp://me@host/model"
    assert urls.without_password("hf://org/model@v1") == "hf://org/model@v1"


@pytest.mark.parametrize("form", ["file://{}", "file:{}", "file://localhost{}", "FILE://{}"])
def test_all_ways_to_write_the_url_of_a_path(form, tmp_path):
    model = make("llama", num_hidden_layers=1).save(tmp_path / "model")
    nf.convert(form.format(model), form.format(tmp_path / "out"))
    assert nf.verify(form.format(tmp_path / "out"), model).equal


def test_protocols_in_capital_letters(faulty, temporary, tmp_path):
    model = make("llama", num_hidden_layers=1).save(tmp_path / "model")
    put(model, URL)
    assert nf.inspect(URL.replace("faulty", "Faulty")).family == "llama"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file://node7/model", "it names a file of the machine 'node7'; a path of this one begins"),
        ("simplecache::s3://me:secret@b/x", "simplecache::s3://me@b/x: one protocol in front of"),
        ("S3://", "S3:: it names no folder"),
    ],
)
def test_urls_that_are_not_taken(url, message, temporary, tmp_path):
    model = make("llama", num_hidden_layers=1).save(tmp_path / "model")
    for work in (lambda: nf.inspect(url), lambda: nf.convert(model, url)):
        with pytest.raises(ConfigError, match=message):
            work()
    assert sorted(os.listdir(tmp_path)) == ["model", "temporary"]


def test_names_that_lead_out_are_refused(faulty, temporary):
    faulty.store["/bucket/models/llama/../../evil"] = faulty()._open("/x", "wb")
    with pytest.raises(CheckpointError, match="is not the name of a file"):
        nf.inspect(URL)


def test_what_cannot_read_urls_says_so(faulty, temporary, model):
    import torch

    put(model, URL)
    with pytest.raises(ConfigError, match="the checkpoint must be on a disk"):
        nf.load_into({"x": torch.zeros(1)}, URL, topology=nf.Topology(), rank=0)
    with pytest.raises(ConfigError, match="the checkpoint must be on a disk"):
        nf.verify(URL, model, logits=True)


def test_what_is_read_from_a_disk_alone_says_so(faulty, temporary, model, tmp_path):
    nf.convert(model, tmp_path / "nanotron")
    put(tmp_path / "nanotron", URL)
    with pytest.raises(CheckpointError, match="are read from a disk alone"):
        nf.convert(URL, tmp_path / "out", master_weights=True)
    faulty().pipe_file("faulty://bucket/dcp/.metadata", b"x")
    faulty().pipe_file("faulty://bucket/dcp/__0_0.distcp", b"x")
    with pytest.raises(CheckpointError, match="is read from a disk alone"):
        nf.convert("faulty://bucket/dcp", tmp_path / "out")


@pytest.mark.parametrize("group_bytes", [1, 1 << 30])
def test_scales_are_fetched_with_what_they_are_for(
    faulty, temporary, tmp_path, monkeypatch, group_bytes
):
    monkeypatch.setattr(running, "GROUP_BYTES", group_bytes)
    coded, _ = quantised(make("llama", num_hidden_layers=1))
    model = coded.save(tmp_path / "model", shards=3)
    put(model, URL)
    nf.convert(URL, tmp_path / "out", topology=TP2)
    nf.convert(model, tmp_path / "expected", topology=TP2)
    assert without_config(tmp_path / "out") == without_config(tmp_path / "expected")
    assert nf.verify(URL, tmp_path / "out").equal
    assert not list(temporary.iterdir())
