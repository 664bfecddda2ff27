"""Folders of torch.distributed.checkpoint that are not what their `.metadata` says."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast as nf
from nanotron_fast.cli.commands import app
from nanotron_fast.errors import CheckpointError, NanotronFastError
from tests.modelzoo import make

torch = pytest.importorskip("torch")
metadata = pytest.importorskip("torch.distributed.checkpoint.metadata")

NORM = "model.norm.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
Change = Callable[[Any], None]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dcp")
    hf = make("llama", num_hidden_layers=1, hidden_size=16, intermediate_size=8).save(root / "hf")
    nf.convert(hf, root / "dcp", to="dcp", max_shard_size=3000)
    return root / "dcp"


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "source"))


def refused(source: Path, message: str) -> None:
    """Refused by every function in one line that names the folder, and nothing is written."""
    before = sorted(path.name for path in source.parent.iterdir())
    for call in (
        lambda: nf.convert(source, source.parent / "out"),
        lambda: nf.plan(source, source.parent / "out", to="hf"),
        lambda: nf.inspect(source),
        lambda: nf.verify(source, source),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            call()
        assert str(source) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1500
    assert sorted(path.name for path in source.parent.iterdir()) == before


def change(source: Path, how: Change) -> None:
    """Changes `.metadata` with torch's own classes."""
    path = source / ".metadata"
    document = pickle.loads(path.read_bytes())
    how(document)
    path.write_bytes(pickle.dumps(document))


def place_of(document: Any, name: str) -> Any:
    return next(info for index, info in document.storage_data.items() if index.fqn == name)


def with_place(name: str, **fields: Any) -> Change:
    def how(document: Any) -> None:
        for field, value in fields.items():
            setattr(place_of(document, name), field, value)

    return how


def with_chunks(name: str, *boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> Change:
    """Chunks at these offsets, of these sizes; where each lies is said."""

    def how(document: Any) -> None:
        document.state_dict_metadata[name].chunks = [
            metadata.ChunkStorageMetadata(torch.Size(low), torch.Size(sizes))
            for low, sizes in boxes
        ]
        for low, _ in boxes:
            index = metadata.MetadataIndex(name, low)
            document.storage_data.setdefault(index, place_of(document, name))

    return how


def test_the_original_is_whole(source: Path) -> None:
    change(source, lambda document: None)
    nf.convert(source, source.parent / "out")


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(X\x04\x00\x00\x00true" + b"tR.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
        b"\x80\x02ctorch\nload\n(X\x01\x00\x00\x00atR.",
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nos\n)R.",
        b"\x80\x02ctorch.storage\n_load_from_bytes\n(C\x01atR.",
    ],
)
def test_globals_that_are_not_dcps_own(data: bytes, source: Path) -> None:
    (source / ".metadata").write_bytes(data)
    refused(source, r"\.metadata: it holds '.*', which is not read")


def test_nothing_is_executed(source: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {source.parent / 'executed'}",)

    change(source, lambda document: setattr(document, "planner_data", Evil()))
    refused(source, r"it holds 'posix.system', which is not read")


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/passwd", "sub/x", "./x", "..", ".", "", "a\0b", "a\nb", None, 7, ["x"]],
)
def test_a_place_outside_of_the_folder(name: Any, source: Path) -> None:
    (source.parent / "outside").write_bytes((source / "__0_0.distcp").read_bytes())
    change(source, with_place(NORM, relative_path=name))
    refused(source, r"it places 'model\.norm\.weight' in .*, which is not the name of a file")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"offset": 1 << 40}, "bytes 1099511627776 to .* are wanted of a file of"),
        ({"offset": (1 << 63) - 1}, "are wanted of a file of"),
        ({"offset": 1 << 63}, "at byte 9223372036854775808 of"),
        ({"offset": -64}, "at byte -64 of"),
        ({"offset": 1.5}, "at byte a float of"),
        ({"offset": True}, "at byte True of"),
        ({"offset": 1}, "bytes 1 to 719 are wanted of a file of 718: truncated"),
        ({"offset": 1, "length": 700}, "it is not a zip file"),
        ({"length": 1 << 62}, "are wanted of a file of"),
        ({"length": 0}, "it is empty, and torch.save writes a zip file"),
        ({"length": 100}, "cut off|damaged"),
        ({"length": None}, "with a NoneType bytes"),
        ({"transform_descriptors": ["zstd"]}, "was written through 'zstd', which is not read"),
        ({"transform_descriptors": 7}, "what was done to .* is not a list"),
        ({"relative_path": "__9_0.distcp"}, r"__9_0.distcp: no such file, and \.metadata places"),
    ],
)
def test_a_place_that_is_not_there(fields: dict[str, Any], message: str, source: Path) -> None:
    change(source, with_place(NORM, **fields))
    refused(source, message)


def test_the_place_of_another_tensor(source: Path) -> None:
    def how(document: Any) -> None:
        other = place_of(document, GATE)
        with_place(NORM, **vars(other))(document)

    change(source, how)
    refused(
        source, r"is a tensor of BF16 \[8, 16\], and \.metadata places BF16 \[16\] of model.norm"
    )


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([], "its chunks hold 0 elements, and .8, 16. has 128: some are missing"),
        ([((0, 0), (7, 16))], "hold 112 elements, .*: some are missing"),
        ([((0, 0), (8, 16)), ((0, 8), (8, 8))], "hold 192 elements, .*: some overlap"),
        ([((0, 0), (4, 16)), ((2, 0), (4, 16))], "overlap, and leave out other elements"),
        (
            [((0, 0), (4, 8)), ((0, 8), (4, 8)), ((4, 0), (4, 8)), ((3, 8), (4, 8))],
            "overlap, and leave out other elements",
        ),
        ([((1, 0), (8, 16))], r"a chunk from \[1, 0\] to \[9, 16\] is not in \[8, 16\]"),
        ([((0, 0), (1 << 62, 1 << 62))], "is not in"),
        ([((0,), (8,))], "is not one of 2 dimensions as the tensor is"),
        ([((0, 0), (8,))], "is not one of 2 dimensions as the tensor is"),
    ],
)
def test_chunks_that_do_not_fill_a_tensor(boxes: Any, message: str, source: Path) -> None:
    change(source, with_chunks(GATE, *boxes))
    refused(source, message)


def test_chunks_that_spiral(source: Path) -> None:
    """No straight cut parts these, and they fill the tensor: what lies there is asked for."""
    spiral = [
        ((0, 0), (2, 10)),
        ((0, 10), (6, 6)),
        ((6, 4), (2, 12)),
        ((2, 0), (6, 4)),
        ((2, 4), (4, 6)),
    ]
    change(source, with_chunks(GATE, *spiral))
    refused(source, r"\.metadata places BF16 \[2, 10\] of")


def test_many_chunks_take_no_time(source: Path) -> None:
    """A staircase of chunks, each cut off alone: neither a deep recursion nor a long comparison."""

    def how(document: Any) -> None:
        size = 1500
        document.state_dict_metadata[GATE].size = torch.Size((size, size))
        boxes = [((row, row), (1, size - row)) for row in range(size)]
        boxes += [((row + 1, row), (size - row - 1, 1)) for row in range(size - 1)]
        with_chunks(GATE, *boxes)(document)

    change(source, how)
    with pytest.raises(CheckpointError, match="overlap, and leave out other elements"):
        nf.inspect(source)


def test_a_chunk_that_lies_nowhere(source: Path) -> None:
    def how(document: Any) -> None:
        index = next(each for each in document.storage_data if each.fqn == GATE)
        del document.storage_data[index]

    change(source, how)
    refused(source, r"does not say where the chunk of 'model.layers.*' at \[0, 0\] lies")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda d: setattr(d, "state_dict_metadata", None), "state_dict_metadata is not a dict"),
        (lambda d: setattr(d, "storage_data", []), "its storage_data is not a dictionary"),
        (lambda d: d.state_dict_metadata.update({NORM: 7}), "'model.norm.weight' is 7, not what"),
        (
            lambda d: d.state_dict_metadata.update({7: d.state_dict_metadata[NORM]}),
            "7 is not the name of a tensor",
        ),
        (
            lambda d: d.state_dict_metadata.update({"a\nb": d.state_dict_metadata[NORM]}),
            r"'a\\nb' is not the name of a tensor",
        ),
        (
            lambda d: d.state_dict_metadata.update({"\ud800": d.state_dict_metadata[NORM]}),
            "is not the name of a tensor",
        ),
        (lambda d: d.storage_data.update({"x": 1}), "the name of an item is 'x', not what DCP"),
        (
            lambda d: setattr(d.state_dict_metadata[NORM], "size", (16,)),
            "is not a dtype, a shape and chunks",
        ),
        (
            lambda d: setattr(d.state_dict_metadata[NORM], "size", torch.Size((1 << 62, 1 << 62))),
            "a chunk of 'model.norm.weight' is not one of 2 dimensions",
        ),
        (
            lambda d: setattr(d.state_dict_metadata[NORM], "size", torch.Size((-1,))),
            "torch.Size of what are not sizes",
        ),
        (
            lambda d: setattr(d.state_dict_metadata[NORM].properties, "dtype", torch.complex128),
            "places complex128",
        ),
        (
            lambda d: setattr(d.state_dict_metadata[NORM].properties, "layout", torch.sparse_coo),
            "'model.norm.weight' is not a dense tensor",
        ),
        (
            lambda d: setattr(d.state_dict_metadata[NORM].properties, "dtype", torch.float32),
            r"is a tensor of BF16 \[16\], and \.metadata places F32 \[16\] of model.norm",
        ),
        (lambda d: d.state_dict_metadata.pop("model.embed_tokens.weight"), "no tensor is called"),
    ],
)
def test_metadata_of_other_things(how: Change, message: str, source: Path) -> None:
    change(source, how)
    refused(source, message)


def test_a_document_that_is_none(source: Path) -> None:
    for document in (None, [], {"state_dict_metadata": {}}, metadata.BytesStorageMetadata()):
        (source / ".metadata").write_bytes(pickle.dumps(document))
        refused(source, r"\.metadata: the document is .*, not what DCP writes")


def test_parts_that_are_repeated_without_end(source: Path) -> None:
    """A list that holds the one before it twice, 60 times over, wherever it is put."""
    bomb: list[Any] = []
    for _ in range(60):
        bomb = [bomb, bomb]
    whole = (source / ".metadata").read_bytes()
    change(source, with_place(NORM, relative_path=bomb))
    refused(source, "which is not the name of a file in the folder")
    (source / ".metadata").write_bytes(whole)
    change(source, lambda document: document.state_dict_metadata.update({NORM: bomb}))
    refused(
        source, "'model.norm.weight' is a list, not what DCP writes|repeats its parts too often"
    )


def test_sizes_that_are_not_there(source: Path) -> None:
    """Lengths that the pickle speaks of, and does not have: nothing is set aside for them."""
    for data in (
        b"\x80\x02X" + struct.pack("<L", 0xFFFFFFFF),
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62),
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62),
        b"\x80\x02N" + b"r" + struct.pack("<L", 0xFFFFFFFF) + b"j" + struct.pack("<L", 7) + b".",
        b"\x80\x02\x8b" + struct.pack("<l", 1 << 30),
        b"\x80\x02" + b"(" * 20_000,
        b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".",
        b"",
        b".",
        b"\x80",
    ):
        (source / ".metadata").write_bytes(data)
        refused(source, r"\.metadata")


def test_a_metadata_file_of_no_size(source: Path) -> None:
    os.truncate(source / ".metadata", 1 << 40)
    refused(source, "are over the limit of")


def test_items_that_are_cut_off(source: Path) -> None:
    path = source / "__0_0.distcp"
    whole = path.read_bytes()
    for size in (0, 1, 63, 64, 700, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(source, "cut off|truncated|not a zip file")


def test_a_pipe_for_an_item(source: Path) -> None:
    (source / "__0_0.distcp").unlink()
    os.mkfifo(source / "__0_0.distcp")
    refused(source, "it is a pipe, not a plain file")


def test_the_command_says_so_in_one_line(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(source, with_place(NORM, offset=1 << 40))
    with pytest.raises(SystemExit) as caught:
        app(["convert", str(source), str(source.parent / "out")], prog_name="nanotron-fast")
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: {source}/__")
    assert said.err.count("\n") == 1
    assert not (source.parent / "out").exists()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_bytes_changed_at_random(name: str, source: Path) -> None:
    """Only this package's errors come out, whatever a byte is."""
    chance = random.Random(name)
    path = source / name
    whole = path.read_bytes()
    before = sorted(os.listdir(source.parent))
    for _ in range(150):
        data = bytearray(whole)
        # In an item's file, where something is said of it: tensors take most of the rest.
        last = len(data) if name == ".metadata" else 1200
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(last)
            way = chance.random()
            if way < 0.6:
                data[at] = chance.randrange(256)
            elif way < 0.8:
                del data[at : at + chance.randrange(1, 20)]
            else:
                data[at:at] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 9)))
        path.write_bytes(data)
        with suppress(NanotronFastError, OSError):
            nf.plan(source, source.parent / "out")
    assert sorted(os.listdir(source.parent)) == before
