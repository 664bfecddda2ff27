"""The manifest of a checkpoint: what is in it, and what a check against it finds."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

import nanotron_fast as nf
from nanotron_fast import _C
from nanotron_fast.checkpoints import manifest
from nanotron_fast.checkpoints.check_manifest import ManifestCheck
from nanotron_fast.checkpoints.reshard import reshard
from nanotron_fast.errors import CheckpointError, NanotronFastError
from nanotron_fast.formats.manifest import NAME
from nanotron_fast.formats.safetensors import read_header

GOLDEN = Path(__file__).parents[1] / "golden"
LAYER = "model/model/decoder/1/pp_block"


def convert(golden: Path, out: Path, **choices: object) -> Path:
    nf.convert(golden / "llama_untied" / "hf", out, manifest=True, **choices)
    return out


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("manifest")
    return convert(GOLDEN, place / "out", topology=nf.Topology(tp=2, pp=2))


@pytest.fixture
def out(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "out"))


def shard(out: Path, name: str = "mlp/down_proj", number: int = 0) -> Path:
    return sorted((out / LAYER / name).iterdir())[number]


def check(out: Path) -> ManifestCheck:
    totals: list[int] = []
    done: list[int] = []
    found = nf.check_manifest(out, on_plan=totals.append, on_progress=done.append)
    assert totals == [found.bytes_checked]
    assert not done or done[-1] == found.bytes_checked
    return found


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x04
    path.write_bytes(data)


def expected_files(out: Path) -> dict[str, object]:
    """What the manifest should say, by the standard library."""
    files = {}
    for path in out.rglob("*.safetensors"):
        header, data = read_header(path), path.read_bytes()
        start = min(each.begin_bytes for each in header.tensors.values())
        files[path.relative_to(out).as_posix()] = {
            "size_bytes": len(data),
            "header_sha256": hashlib.sha256(data[:start]).hexdigest(),
            "tensors": {
                name: {
                    "dtype": each.dtype,
                    "shape": list(each.shape),
                    "file_offsets": [each.begin_bytes, each.end_bytes],
                    "sha256": hashlib.sha256(data[each.begin_bytes : each.end_bytes]).hexdigest(),
                }
                for name, each in header.tensors.items()
            },
        }
    return files


@pytest.mark.parametrize("to_hf", [False, True])
@pytest.mark.parametrize("io", ["auto", "buffered", "direct", "dontcache"])
def test_it_has_every_tensor_of_every_file(
    to_hf: bool, io: str, written: Path, golden: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if to_hf:
        nf.convert(written, out, manifest=True, io=io, max_shard_size="40KB")
        assert len(list(out.glob("*.safetensors"))) > 2
    else:
        convert(golden, out, topology=nf.Topology(tp=2, pp=2), io=io)
    document = json.loads((out / NAME).read_bytes())
    assert document["files"] == expected_files(out)
    assert (document["format_version"], document["hash"]) == (1, "sha256")
    assert check(out).intact


def test_a_conversion_without_it_writes_none(golden: Path, tmp_path: Path) -> None:
    nf.convert(golden / "llama_untied" / "hf", tmp_path / "out")
    assert not (tmp_path / "out" / NAME).exists()


def test_it_is_neither_carried_nor_foreign(out: Path, golden: Path, tmp_path: Path) -> None:
    report = nf.convert(out, tmp_path / "hf")
    assert not (tmp_path / "hf" / NAME).exists()
    assert NAME not in report.plan.left_behind
    convert(golden, out, overwrite=True)
    assert check(out).intact


@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_flipped_bit_names_the_parameter(out: Path, place: int) -> None:
    path = shard(out)
    flip(path, read_header(path).tensors["data"].begin_bytes + place if place >= 0 else place)
    (finding,) = check(out).findings
    assert finding.file == path.relative_to(out).as_posix()
    assert finding.tensor == "data"
    begin = read_header(path).tensors["data"].begin_bytes
    assert finding.found_sha256 == hashlib.sha256(path.read_bytes()[begin:]).hexdigest()
    assert finding.wanted_sha256 != finding.found_sha256
    assert str(finding).startswith(f"data in {finding.file}: its ")


def test_a_changed_header_is_told(out: Path) -> None:
    path = shard(out)
    at = path.read_bytes().index(b"unsharded_shape") + len(b'unsharded_shape":"(')
    flip(path, at + 1)
    (finding,) = check(out).findings
    assert (finding.tensor, finding.reason) == (None, "its header has changed")


def test_missing_and_shortened_files_are_told(out: Path) -> None:
    shard(out, "mlp/down_proj").unlink()
    os.truncate(shard(out, "attn/o_proj"), 4100)
    found = check(out)
    gone, short, truncated = sorted(found.findings, key=lambda each: each.file, reverse=True)
    assert gone.reason == "it is missing"
    assert "attn/o_proj" in short.file
    assert "attn/o_proj" in truncated.file
    reasons = {short.reason, truncated.reason}
    assert any(reason.startswith("it has 4,100 bytes, and had ") for reason in reasons)
    assert any("truncated" in reason for reason in reasons)


def test_another_dtype_an_unknown_tensor_and_an_unknown_file_are_told(out: Path) -> None:
    path = shard(out)
    path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"F16" '))
    other = shard(out, "attn/o_proj", 1)
    other.write_bytes(other.read_bytes().replace(b'"data"', b'"date"'))
    more = path.with_name("model_weight_stale.safetensors")
    shutil.copy(path, more)
    reasons = {
        (each.file.rpartition("/")[2], each.tensor): each.reason for each in check(out).findings
    }
    assert reasons[path.name, "data"].startswith("it is F16 [")
    assert reasons[other.name, "data"] == "the tensor is missing"
    assert reasons[other.name, "date"] == "the manifest does not know this tensor"
    assert reasons[more.name, None] == f"{NAME} does not know this file"
    assert len(reasons) == 4


def test_a_url_of_a_folder_is_that_folder(out: Path) -> None:
    assert nf.check_manifest(f"file://{out}") == check(out)


def test_what_lies_in_a_store_is_refused() -> None:
    message = "^s3://me@bucket/out: files are checked against their manifest on a disk alone"
    with pytest.raises(CheckpointError, match=message):
        nf.check_manifest("s3://me:secret@bucket/out")


def test_without_a_manifest_it_says_what_would_help(out: Path) -> None:
    (out / NAME).unlink()
    with pytest.raises(
        CheckpointError, match=r"has no nanotron_fast_manifest.json, which `convert"
    ):
        nf.check_manifest(out)
    with pytest.raises(CheckpointError, match="no such directory"):
        nf.check_manifest(out / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda doc: doc.update(format_version=2), "format_version 2"),
        (lambda doc: doc.update(files=[]), "files is not an object"),
        (lambda doc: doc["files"].update({"../x": {}}), "not the path of a file in the checkpoint"),
        (lambda doc: doc["files"].update({"/x": {}}), "not the path of a file in the checkpoint"),
        (lambda doc: doc["files"].update(x=3), "x: it has no tensors"),
        (lambda doc: doc["files"].update(x={"tensors": {}, "size_bytes": -1}), "size_bytes is -1"),
        (lambda doc: entry(doc).update(sha256="0f"), "'0f' is not a SHA-256"),
        (lambda doc: entry(doc).update(file_offsets=[9, 8]), "bytes 9 to 8 do not lie in a file"),
        (lambda doc: entry(doc).update(file_offsets=[1 << 70, 8]), "are not two offsets"),
        (lambda doc: entry(doc).update(shape="x"), "dtype 'BF16' and shape 'x'"),
    ],
)
def test_a_damaged_manifest_is_one_clear_error(out: Path, change: object, message: str) -> None:
    document = json.loads((out / NAME).read_bytes())
    change(document)  # type: ignore[operator]
    (out / NAME).write_text(json.dumps(document))
    with pytest.raises(NanotronFastError, match=message):
        nf.check_manifest(out)


def entry(document: dict[str, dict[str, dict[str, dict[str, dict[str, object]]]]]) -> dict:
    """The first tensor's."""
    file = next(iter(document["files"].values()))
    return next(iter(file["tensors"].values()))


def test_an_unknown_way_of_reading_and_writing_is_refused(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(NanotronFastError, match="--io fast: choose auto, buffered, direct or"):
        nf.convert(golden / "llama_untied" / "hf", tmp_path / "out", io="fast")
    assert not (tmp_path / "out").exists()


def test_shares_and_a_run_that_finishes_them_make_the_same(
    written: Path, golden: Path, tmp_path: Path
) -> None:
    topology = nf.Topology(tp=2, pp=2)
    for number in (1, 2):
        convert(golden, tmp_path / "out", topology=topology, share=(number, 2))
    convert(golden, tmp_path / "out", topology=topology, finish=True)
    assert (tmp_path / "out" / NAME).read_bytes() == (written / NAME).read_bytes()


def test_what_was_finished_before_is_in_it(
    written: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files whose digests the run before kept, none is read again; else they are hashed."""
    again: list[int] = []
    hash_again = manifest.hash_again
    monkeypatch.setattr(
        manifest,
        "hash_again",
        lambda root, outputs, **more: (
            again.append(len(outputs)) or hash_again(root, outputs, **more)
        ),
    )
    topology = nf.Topology(tp=2, pp=2)
    for keeps in (True, False):
        out = tmp_path / f"out-{keeps}"
        again.clear()
        _C.set_failure_point("write:60:EIO")
        try:
            with pytest.raises(OSError, match="Input/output error"):
                nf.convert(
                    golden / "llama_untied" / "hf",
                    out,
                    topology=topology,
                    manifest=keeps,
                    workers=1,
                )
        finally:
            _C.set_failure_point("")
        assert not out.exists()
        report = nf.convert(
            golden / "llama_untied" / "hf", out, topology=topology, manifest=True, resume=True
        )
        assert (out / NAME).read_bytes() == (written / NAME).read_bytes()
        assert 0 < len(report.part.outputs) < len(report.plan.transfer.outputs)
        assert bool(again) is not keeps


def test_what_a_file_system_refuses_is_a_warning(golden: Path, tmp_path: Path) -> None:
    _C.set_failure_point("write:1:EOPNOTSUPP")
    try:
        report = nf.convert(golden / "llama_untied" / "hf", tmp_path / "out", io="dontcache")
    finally:
        _C.set_failure_point("")
    (warning,) = report.warnings
    assert warning.startswith("--io dontcache: ")
    assert warning.endswith("what is carried is dropped from the page cache afterwards")
    assert nf.verify(golden / "llama_untied" / "hf", tmp_path / "out").equal


def test_states_of_an_optimizer_are_named_as_in_their_document(
    golden: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    reshard(
        next((golden / "training").rglob("model_config.json")).parent,
        out,
        tp=1,
        manifest=True,
    )
    assert check(out).intact
    path = sorted((out / "optimizer").rglob("*.pt"))[0]
    entries = json.loads((out / NAME).read_bytes())["files"][path.relative_to(out).as_posix()]
    name = next(name for name in entries["tensors"] if name.endswith("exp_avg"))
    flip(path, entries["tensors"][name]["file_offsets"][0])
    (finding,) = check(out).findings
    assert (finding.file, finding.tensor) == (path.relative_to(out).as_posix(), name)
    flip(path, entries["tensors"][name]["file_offsets"][0])
    flip(path, 3)
    (finding,) = check(out).findings
    assert finding.reason == "the bytes around its tensors have changed"
