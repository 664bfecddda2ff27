"""What is laid out without torch is what torch.load, zipfile and the own reader open."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.torch_file import NewTensor, StoredTensor, lay_out, read_torch_file
from nanotron_fast.moves.dtypes import Dtype

TENSORS = {
    "a": torch.arange(24, dtype=torch.float32).view(2, 3, 4),
    "b": torch.randn(7, 5, dtype=torch.float64),
    "c": torch.randn(129).to(torch.bfloat16),
    "d": torch.randn(1, 1).to(torch.float16),
    "e": torch.empty(0, 3),
}
DTYPES = {
    torch.float32: Dtype.F32,
    torch.float64: Dtype.F64,
    torch.bfloat16: Dtype.BF16,
    torch.float16: Dtype.F16,
}


def placeholder(key: str) -> NewTensor:
    tensor = TENSORS[key]
    return NewTensor(key, DTYPES[tensor.dtype], tuple(tensor.shape))


def document() -> Any:
    step = NewTensor("step", Dtype.F32, (), torch.tensor(3.0).numpy().tobytes())
    return {
        "state": {0: {"step": step, "a": placeholder("a"), "b": placeholder("b")}},
        "c": [placeholder("c"), (placeholder("d"),)],
        "e": placeholder("e"),
        "plain": [0, 255, 256, -1, 2**31, -(2**40), 0.5, None, True, "ß", (), [], {}, (1, 2)],
    }


def write(path: Path) -> Path:
    """As the engine does it: the literals, the tensors at their places, then the checksums."""
    layout = lay_out(document())
    with open(path, "wb") as file:
        file.truncate(layout.size_bytes)
        position = 0
        for at, data in layout.literals:
            assert at >= position
            file.seek(at)
            file.write(data)
            position = at + len(data)
        assert position == layout.size_bytes
        for key, at in layout.offsets.items():
            assert at % 64 == 0
            file.seek(at)
            file.write(TENSORS[str(key)].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    with open(path, "r+b") as file:
        for checksum in layout.checksums:
            file.seek(checksum.begin_bytes)
            crc = zlib.crc32(file.read(checksum.num_bytes))
            for at in checksum.at:
                file.seek(at)
                file.write(crc.to_bytes(4, "little"))
    return path


@pytest.mark.parametrize("mmap", [True, False])
def test_torch_reads_it(tmp_path: Path, mmap: bool) -> None:
    read = torch.load(write(tmp_path / "a.pt"), weights_only=True, mmap=mmap)
    assert read["plain"] == document()["plain"]
    assert read["state"][0]["step"].item() == 3
    found = {
        **{key: read["state"][0][key] for key in "ab"},
        "c": read["c"][0],
        "d": read["c"][1][0],
        "e": read["e"],
    }
    for key, tensor in TENSORS.items():
        assert found[key].dtype is tensor.dtype
        assert torch.equal(found[key], tensor)


def test_zip_programs_find_no_fault(tmp_path: Path) -> None:
    with zipfile.ZipFile(write(tmp_path / "a.pt")) as file:
        assert file.testzip() is None
        assert file.namelist()[0] == "archive/data.pkl"


def test_it_is_read_back(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt")
    read = read_torch_file(path)
    layout = lay_out(document())
    stored = read["state"][0]["a"]
    assert stored == StoredTensor(path, layout.offsets["a"], "F32", (2, 3, 4), (12, 4, 1))
    assert read["plain"] == document()["plain"]


def sparse(path: Path, tensors: list[NewTensor]) -> Path:
    layout = lay_out(tensors)
    with open(path, "wb") as file:
        file.truncate(layout.size_bytes)
        for at, data in layout.literals:
            file.seek(at)
            file.write(data)
    return path


def test_tensors_over_4_gib(tmp_path: Path) -> None:
    shapes = [(3,), (2**30 + 1,), (5,)]
    path = sparse(tmp_path / "a.pt", [NewTensor(i, Dtype.F32, s) for i, s in enumerate(shapes)])
    assert [tensor.shape for tensor in read_torch_file(path)] == shapes
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert [tuple(tensor.shape) for tensor in loaded] == shapes
    with zipfile.ZipFile(path) as file:
        assert [info.file_size for info in file.infolist() if "/data/" in info.filename] == [
            4 * shape[0] for shape in shapes
        ]


def test_more_records_than_16_bits_count(tmp_path: Path) -> None:
    tensors = [NewTensor(index, Dtype.F32, (1,), bytes(4)) for index in range(66_000)]
    path = sparse(tmp_path / "a.pt", tensors)
    assert len(read_torch_file(path)) == 66_000
    with zipfile.ZipFile(path) as file:
        assert len(file.infolist()) == 66_003


def test_what_cannot_be_written() -> None:
    with pytest.raises(CheckpointError, match="set"):
        lay_out({"a": {1, 2}})
    with pytest.raises(CheckpointError, match="key 0"):
        lay_out([NewTensor(0, Dtype.F32, (1,)), NewTensor(0, Dtype.F32, (1,))])
    with pytest.raises(CheckpointError, match="3 bytes"):
        lay_out(NewTensor(0, Dtype.F32, (1,), b"abc"))
