"""What torch.save writes is read without torch, and hostile files are refused in one line."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.torch_file import NewTensor, StoredTensor, lay_out, read_torch_file
from nanotron_fast.formats.torch_file.pickled import unpickle
from nanotron_fast.moves.dtypes import Dtype

PROTOCOL = b"\x80\x02"


def values_of(tensor: StoredTensor) -> Any:
    """The tensor's elements as bytes of each, read from where it is said to lie."""
    raw = torch.from_file(str(tensor.path), False, tensor.path.stat().st_size, dtype=torch.uint8)
    item = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "BOOL": 1, "F8_E4M3": 1}[tensor.dtype]
    return np.lib.stride_tricks.as_strided(
        raw.numpy()[tensor.offset_bytes :],
        (*tensor.shape, item),
        (*(stride * item for stride in tensor.strides), 1),
    )


def bytes_of(tensor: torch.Tensor) -> Any:
    shape = tensor.shape
    tensor = tensor.detach().contiguous().view(-1)
    return tensor.view(torch.uint8).numpy().reshape(*shape, tensor.element_size())


def saved(path: Path, document: Any) -> Path:
    torch.save(document, path)
    return path


def test_a_document_is_what_torch_reads(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32)
    document = {
        "state": {0: {"step": torch.tensor(3.0), "view": whole[6:18].view(3, 4).t()}},
        "names": OrderedDict([(0, "a.b"), (1, "ß")]),
        "list": [
            1,
            -2,
            2**40,
            -(2**70),
            0.5,
            True,
            None,
            (),
            (1,),
            (1, 2, 3, 4),
            b"\xff\0",
            {1, 2},
        ],
        "types": [torch.float32, torch.Size([2, 3])],
        "bf16": torch.ones(2, 3, dtype=torch.bfloat16),
        "int": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.empty(0, 3),
    }
    read = read_torch_file(saved(tmp_path / "a.pt", document))
    for found, tensor in (
        (read["state"][0]["step"], document["state"][0]["step"]),
        (read["state"][0]["view"], document["state"][0]["view"]),
        *((read[key], document[key]) for key in ("bf16", "int", "bool", "float8", "parameter")),
    ):
        assert found.shape == tuple(tensor.shape)
        assert found.strides == tensor.stride()
        assert np.array_equal(values_of(found), bytes_of(tensor))
    assert read["names"] == document["names"]
    assert read["list"] == document["list"]
    assert read["types"] == ["F32", (2, 3)]
    assert read["empty"].shape == (0, 3)
    assert read["empty"].num_elements == 0
    assert not read["state"][0]["view"].is_contiguous
    assert read["bf16"].is_contiguous


def test_an_archive_may_be_a_range_of_a_file(tmp_path: Path) -> None:
    one = saved(tmp_path / "one.pt", {"a": torch.full((4,), 7.0)}).read_bytes()
    path = tmp_path / "many.distcp"
    path.write_bytes(b"x" * 1001 + one + one[:-1])
    read = read_torch_file(path, offset_bytes=1001, size_bytes=len(one))
    assert np.array_equal(values_of(read["a"]), bytes_of(torch.full((4,), 7.0)))
    for offset, size in ((1000, len(one)), (1001, len(one) - 1), (1001 + len(one), len(one))):
        with pytest.raises(CheckpointError, match=r"many\.distcp"):
            read_torch_file(path, offset_bytes=offset, size_bytes=size)
    with pytest.raises(CheckpointError, match=f"cut off.* {len(one) - 1:,} bytes"):
        read_torch_file(path, offset_bytes=1001 + len(one), size_bytes=len(one) - 1)


@pytest.mark.parametrize("keep", [0, 1, 30, 200, -1, -22, -23, -60, -300])
def test_a_file_cut_short(tmp_path: Path, keep: int) -> None:
    path = saved(tmp_path / "a.pt", {"a": torch.ones(50)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"a\.pt: it (was cut off|is empty)"):
        read_torch_file(path)


@pytest.mark.parametrize("writer", ["torch", "ours"])
def test_what_was_lost_of_a_file_that_was_cut_off(tmp_path: Path, writer: str) -> None:
    """The document at its beginning says how long it was."""
    path = tmp_path / "a.pt"
    if writer == "torch":
        saved(path, {"a": torch.ones(5000), "again": torch.ones(3)})
    else:
        layout = lay_out({"a": NewTensor("a", Dtype.F32, (5003,))})
        whole = bytearray(layout.size_bytes)
        for at, data in layout.literals:
            whole[at : at + len(data)] = data
        path.write_bytes(whole)
    whole = path.read_bytes()
    for size in (1500, 19_999):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError) as raised:
            read_torch_file(path)
        assert str(raised.value) == (
            f"{path}: it was cut off: it has {size:,} bytes, and its tensors alone take 20,012"
        )
    # As long as it was, and never written: as after a loss of power.
    path.write_bytes(whole[:1500] + bytes(len(whole) - 1500))
    with pytest.raises(CheckpointError, match=f"not written to its end: it has {len(whole):,} byt"):
        read_torch_file(path)


def test_no_byte_that_is_changed_does_harm(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"a": torch.ones(3), "b": [(1, "x")]})
    whole = path.read_bytes()
    said = []
    for at in range(len(whole)):
        for byte in (0, 0xFF, whole[at] ^ 1):
            path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
            try:
                document = read_torch_file(path)
            except CheckpointError as error:
                said.append(str(error))
                continue
            for tensor in document.values() if isinstance(document, dict) else ():
                if isinstance(tensor, StoredTensor) and tensor.num_elements:
                    assert values_of(tensor).nbytes
    assert all("a.pt" in each and len(each) < 700 for each in said)
    assert len(said) > 1000


def test_an_older_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": 1}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"a\.pt: .*before 1\.6.*torch\.save"):
        read_torch_file(path)


def zipped(path: Path, records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in records.items():
            file.writestr(name, data)
    return path


def test_other_zip_files(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for records, said in (
        ({"a/b": b"x"}, r"without a data\.pkl"),
        ({}, "not a zip|without|directory"),
        ({"a/data.pkl": b"N.", "b/data.pkl": b"N."}, r"2 records of the name data\.pkl"),
        ({"a/data.pkl": b"N.", "a/code/x.py": b""}, "TorchScript"),
        ({"a/data.pkl": b"N.", "a/byteorder": b"big"}, "byte order 'big'"),
    ):
        with pytest.raises(CheckpointError, match=said):
            read_torch_file(zipped(path, records))
    compressed = {"a/data.pkl": PROTOCOL + b"N" + b"." * 1000}
    with pytest.raises(CheckpointError, match=r"'a/data\.pkl' is compressed"):
        read_torch_file(zipped(path, compressed, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", b"N.")
        file.writestr("a/data.pkk", b"N.")
    path.write_bytes(path.read_bytes().replace(b"data.pkk", b"data.pkl"))
    with pytest.raises(CheckpointError, match="two records"):
        read_torch_file(path)


def test_wide_numbers_of_a_zip_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as file, file.open("a/data.pkl", "w", force_zip64=True) as part:
        part.write(PROTOCOL + b"K\x07.")
    assert read_torch_file(path) == 7
    # The directory's numbers moved to where those of archives over 4 GiB are.
    raw = path.read_bytes()
    end = struct.unpack("<4s4H2LH", raw[-22:])
    at = len(raw) - 22
    wide = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, end[5], end[6])
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, at, 1)
    last = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    path.write_bytes(raw[:at] + wide + locator + last)
    assert read_torch_file(path) == 7
    for numbers in ((1, 1, end[5], 2**63), (2**62, 2**62, end[5], end[6]), (1, 1, 2**64 - 1, 0)):
        bad = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, *numbers)
        path.write_bytes(raw[:at] + bad + locator + last)
        with pytest.raises(CheckpointError, match="directory"):
            read_torch_file(path)
    path.write_bytes(raw[:at] + wide + struct.pack("<4sLQL", b"PK\x06\x07", 0, 2**63, 1) + last)
    with pytest.raises(CheckpointError, match="damaged"):
        read_torch_file(path)


class Harmful:
    def __reduce__(self) -> Any:
        import os

        return os.mkdir, ("harm",)


def test_nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "a.pt", {"a": Harmful()})
    with pytest.raises(CheckpointError, match=r"a\.pt: it holds '(posix|os)\.mkdir'"):
        read_torch_file(path)
    assert not (tmp_path / "harm").exists()
    for name in (b"builtins\neval", b"__builtin__\ngetattr", b"collections\nOrderedDict.fromkeys"):
        with pytest.raises(CheckpointError, match="which is not read"):
            read_torch_file(zipped(path, {"a/data.pkl": PROTOCOL + b"c" + name + b"\n."}))


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def tensor_pickle(
    *, offset: int = 0, shape: Any = (2,), strides: Any = (1,), count: Any = 4, key: Any = "0"
) -> bytes:
    def plain(value: Any) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    storage = b"(" + plain("storage") + b"ctorch\nFloatStorage\n" + plain(key) + plain("cpu")
    storage += plain(count) + b"tQ"
    rest = plain(offset) + plain(shape) + plain(strides) + b"\x89}"
    return PROTOCOL + REBUILD + b"(" + storage + rest + b"tR."


def test_tensors_outside_of_their_storage(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"

    def read(**fields: Any) -> Any:
        records = {"a/data.pkl": tensor_pickle(**fields), "a/data/0": bytes(16)}
        return read_torch_file(zipped(path, records))

    assert read().shape == (2,)
    assert read(offset=2).num_elements == 2
    assert read(shape=(0,), offset=4).num_elements == 0
    assert read(shape=(2**40,), strides=(0,)).strides == (0,)
    for fields in (
        {"offset": 3},
        {"offset": -1},
        {"offset": 2**64},
        {"offset": 0.5},
        {"offset": True},
        {"shape": (-1,)},
        {"shape": (5,)},
        {"shape": (2,), "strides": (-1,)},
        {"shape": (2,), "strides": (2**62,)},
        {"shape": (2, 2)},
        {"shape": (2**32, 2**32), "strides": (0, 0)},
        {"shape": (1,) * 70, "strides": (1,) * 70},
        {"shape": "ab"},
        {"shape": ([],)},
        {"strides": None},
        {"count": 5},
        {"count": 2**62},
        {"count": -1},
        {"count": None},
        {"key": "1"},
        {"key": "../0"},
        {"key": 0},
        {"key": "x" * 5000},
    ):
        with pytest.raises(CheckpointError, match=r"a\.pt: ") as raised:
            read(**fields)
        assert len(str(raised.value)) < 700


def nested(depth: int) -> bytes:
    return b"]" * depth + b"a" * (depth - 1)


@pytest.mark.parametrize(
    "program",
    [
        nested(65),
        nested(100_000),
        b")" + b"\x85" * 100_000,
        b"}" + b")" + b"\x85" * 100_000 + b"Ns",  # As a key its hash would crash Python.
        b"}q\0h\0h\0s",
        b"]q\0h\0a",
        b"]q\0(" + b"h\0" * 10 + b"lq\0(" * 40 + b"l" * 40,
        b"".join([b")q\0", *(b"0h\0h\0\x86q\0" for _ in range(60))]),  # 2**60 parts.
        b"}q\0" + b"".join(b"h\0h\0\x86\x91" for _ in range(3)),
        b"X\xff\xff\xff\x7fabc",
        b"\x8d" + b"\xff" * 8 + b"abc",
        b"\x8e" + b"\xff" * 7 + b"\x7fabc",
        b"B\xff\xff\xff\xffabc",
        b"\x8b\xff\xff\xff\x7f",
        b"\x8a\xff" + b"1" * 255,
        b"\x95" + b"\xff" * 8,
        b"r\xff\xff\xff\x7f",
        b"j\xff\xff\xff\x7f",
        b"h\0",
        b"0",
        b"t",
        b"u",
        b"e",
        b"R",
        b"Q",
        b"NNs",
        b"Na",
        b"N(e",
        b"}(Nu",
        b"}(]Nu",
        b"}\x8f]\x90",
        b"N}b",
        b"ccollections\nOrderedDict\n",
        b"ccollections\nOrderedDict\n}b",
        b"ccollections\nOrderedDict\nNR",
        b"ccollections\nOrderedDict\n(K\1tR",
        b"ctorch\nFloatStorage\n)R",
        b"Nctorch._utils\n_rebuild_parameter\nh\0\x85R",
        b"X\1\0\0\0\xff",
        b"I1\n",
        b"(lios\nsystem\n",
        b"\x82\1",
        b"\x93",
        b"NN\x93",
        b"ios\nsystem\n",
        b"NN",
        b"(N",
        b"",
        b"\x80\x06N",
    ],
    ids=lambda program: repr(program[:24]),
)
def test_programs_of_no_use(program: bytes) -> None:
    data = PROTOCOL + program + b"."
    with pytest.raises(CheckpointError, match=r"a\.pt: ") as raised:
        unpickle(data, where="a.pt", callables=CALLABLES, constants={})
    assert len(str(raised.value)) < 700


CALLABLES = {"collections.OrderedDict": dict}


def test_what_a_caller_allows() -> None:
    class Own:
        def __init__(self, *parts: Any) -> None:
            self.parts = parts

        def __setstate__(self, state: Any) -> None:
            self.state = state

    program = b"\x8c\1m\x8c\1c\x93)\x81}\x8c\1xK\5sb."
    made = unpickle(b"\x80\4" + program, where="a.pt", callables={"m.c": Own}, constants={})
    assert isinstance(made, Own)
    assert made.parts == ()
    assert made.state == {"x": 5}
