"""Shards written with their slices and read at another topology, without Nanotron."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanotron_fast.checkpoints.load import read_moves
from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.safetensors import read_header
from nanotron_fast.moves.plan import MovePlan, OutputFile
from nanotron_fast.patch.nanotron.replacements import checkpoints
from nanotron_fast.patch.nanotron.replacements.checkpoint_files import Unserved
from nanotron_fast.patch.nanotron.replacements.checkpoint_moves import shard_moves, whole_move
from nanotron_fast.patch.nanotron.replacements.checkpoints import File, write_files

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def pairs_of(
    shape: Sequence[int], dim: int, chunks: Sequence[int], size: int, rank: int
) -> list[Any]:
    """As Nanotron has them: each chunk of a dimension is split on its own."""
    pairs, start = [], 0
    for chunk in chunks:
        share = chunk // size
        local = [slice(None)] * len(shape)
        whole = [slice(None)] * len(shape)
        if len(chunks) > 1:
            local[dim] = slice(start // size, start // size + share)
        whole[dim] = slice(start + rank * share, start + (rank + 1) * share)
        pairs.append(SimpleNamespace(local_slices=tuple(local), global_slices=tuple(whole)))
        start += chunk
    return pairs


def shard_of(whole: Tensor, dim: int, pairs: list[Any]) -> Tensor:
    return torch.cat([whole[pair.global_slices] for pair in pairs], dim).contiguous()


def file_of(folder: Path, name: str, tensor: Tensor) -> File:
    return File(folder / name, folder / f".{name}.partial", tensor, {})


def write_shards(
    folder: Path, whole: Tensor, dim: int, chunks: Sequence[int], size: int
) -> dict[Path, tuple[int, Any, Any]]:
    """Files of all ranks, as `shard_moves` takes them."""
    shards: dict[Path, Any] = {}
    for rank in range(size):
        pairs = pairs_of(whole.shape, dim, chunks, size, rank)
        file = file_of(folder, f"model_weight_tp-rank-{rank}", shard_of(whole, dim, pairs))
        write_files([file])
        said = SimpleNamespace(local_global_slices_pairs=pairs, unsharded_shape=whole.shape)
        shards[file.path] = (rank, read_header(file.path), said)
    return shards


def fill(tensor: Tensor, moves: list[Any], paths: Sequence[Path]) -> int:
    transfer = MovePlan(tuple(paths), (OutputFile("tensor", b"", tensor.nbytes),), tuple(moves))
    transfer.check()
    return read_moves(transfer, [tensor], tensor.device)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_way_of_sharding_becomes_any_other(
    tmp_path_factory: pytest.TempPathFactory, device: str, data: st.DataObject
) -> None:
    draw = data.draw
    num_dims = draw(st.integers(1, 3))
    dim = draw(st.integers(0, num_dims - 1))
    chunks = [12 * n for n in draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))]
    shape = [draw(st.integers(1, 5)) for _ in range(num_dims)]
    shape[dim] = sum(chunks)
    saved, wanted = draw(st.sampled_from((1, 2, 3, 4))), draw(st.sampled_from((1, 2, 3, 4)))
    stored, dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    whole = torch.randn(shape).to(stored)
    folder = tmp_path_factory.mktemp("shards")
    shards = write_shards(folder, whole.to(device), dim, chunks, saved)
    for rank in range(wanted):
        pairs = pairs_of(shape, dim, chunks, wanted, rank)
        expected = shard_of(whole, dim, pairs).to(dtype)
        tensor = torch.full_like(expected, float("nan"), device=device)
        bytes_read = fill(tensor, shard_moves("w", tensor, 0, pairs, shards), [*shards])
        assert torch.equal(tensor.cpu(), expected)
        # Of a single column, what lies between its elements is read with them.
        assert tensor.numel() <= bytes_read // stored.itemsize <= whole.numel()


WHOLE = torch.arange(32.0).view(8, 4)


def moves_of(folder: Path, tensor: Tensor, pairs: list[Any], **changes: Any) -> Any:
    shards = write_shards(folder, WHOLE, 0, [8], 2)
    (path, last) = [*shards.items()][-1]
    for name, value in changes.items():
        if name == "header":
            shards[path] = (last[0], value, last[2])
        else:
            setattr(last[2], name, value)
    return shard_moves("w", tensor, 0, pairs, shards)


def test_shards_that_are_missing(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, WHOLE, 0, [8], 4)
    del shards[tmp_path / "model_weight_tp-rank-1"]
    pairs = pairs_of(WHOLE.shape, 0, [8], 2, 0)
    with pytest.raises(CheckpointError, match=r"w: the 3 shards in .* hold 8 of the 16 elements"):
        shard_moves("w", torch.empty(4, 4), 0, pairs, shards)
    pairs = pairs_of(WHOLE.shape, 0, [8], 2, 1)  # which needs the others alone
    assert shard_moves("w", torch.empty(4, 4), 0, pairs, shards)


def test_shards_that_contradict_each_other_or_the_tensor(tmp_path: Path) -> None:
    pairs = pairs_of(WHOLE.shape, 0, [8], 1, 0)
    with pytest.raises(CheckpointError, match=r"rank-1: it is a shard of a tensor of \[8, 5\]"):
        moves_of(tmp_path, torch.empty(8, 4), pairs, unsharded_shape=(8, 5))
    short = pairs_of((6, 4), 0, [6], 2, 1)
    with pytest.raises(CheckpointError, match=r"rank-1: of shape \[4, 4\], and .* is not"):
        moves_of(tmp_path, torch.empty(8, 4), pairs, local_global_slices_pairs=short)
    with pytest.raises(CheckpointError, match=r"^w: of shape \[9, 4\]"):
        moves_of(tmp_path, torch.empty(9, 4), pairs)
    with pytest.raises(CheckpointError, match="w: 2 slices of 1 dimensions"):
        moves_of(tmp_path, torch.empty(8), pairs)


def test_what_moves_cannot_say(tmp_path: Path) -> None:
    pairs = pairs_of(WHOLE.shape, 0, [8], 1, 0)
    overlapping = pairs_of(WHOLE.shape, 0, [8], 2, 0)
    shards = write_shards(tmp_path, WHOLE, 0, [8], 2)
    shards[tmp_path / "again"] = next(iter(shards.values()))
    with pytest.raises(Unserved, match="overlap"):
        shard_moves("w", torch.empty(8, 4), 0, pairs, shards)
    stepping = SimpleNamespace(
        local_slices=(slice(None), slice(None)), global_slices=(slice(0, 8, 2), slice(None))
    )
    with pytest.raises(Unserved, match="steps"):
        moves_of(tmp_path, torch.empty(8, 4), pairs, local_global_slices_pairs=[stepping])
    with pytest.raises(Unserved, match="do not make it up"):
        moves_of(tmp_path, torch.empty(4, 4), overlapping * 2)
    with pytest.raises(Unserved, match="4 dimensions"):
        moves_of(tmp_path, torch.empty(8, 4, 1, 1), pairs)
    save_file({"data": torch.zeros(4, 4, dtype=torch.int64)}, tmp_path / "odd")
    with pytest.raises(Unserved, match=r"I64 in .*odd"):
        moves_of(tmp_path, torch.empty(8, 4), pairs, header=read_header(tmp_path / "odd"))


def test_a_file_that_is_another(tmp_path: Path) -> None:
    save_file({"data": torch.zeros(2, 3)}, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"a: its shape is \[2, 3\], and w is \[3, 2\]"):
        whole_move("w", torch.empty(3, 2), 0, read_header(tmp_path / "a"), 0)
    save_file({"weight": torch.zeros(2)}, tmp_path / "b")
    with pytest.raises(CheckpointError, match="b: it holds weight; a Nanotron file holds 'data'"):
        whole_move("w", torch.empty(2), 0, read_header(tmp_path / "b"), 0)
    save_file({"data": torch.zeros(2), "_no_weight_decay": torch.tensor(True)}, tmp_path / "c")
    with pytest.raises(Unserved, match="_no_weight_decay"):
        whole_move("w", torch.empty(2), 0, read_header(tmp_path / "c"), 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 7), (1000, 33)])
def test_what_is_written_is_what_safetensors_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(checkpoints, "_PINNED_BYTES", 4096)  # several parts
    tensors = {dtype: torch.randn(shape).to(dtype) for dtype in (*DTYPES, torch.float64)}
    folder = tmp_path / "model" / "deep"
    files = [file_of(folder, str(dtype), each.to(device)) for dtype, each in tensors.items()]
    assert write_files(files) == sum(each.nbytes for each in tensors.values())
    assert sorted(folder.iterdir()) == sorted(file.path for file in files)
    for file, tensor in zip(files, tensors.values(), strict=True):
        found = load_file(file.path)["data"]
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to write more into a file, as it does when the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_nothing_is_half_written(tmp_path: Path) -> None:
    before = file_of(tmp_path, "large", torch.zeros(1 << 18))
    write_files([before])
    files = [file_of(tmp_path, name, torch.ones(1 << 18)) for name in ("large", "other")]
    with files_up_to(1 << 18), pytest.raises(OSError, match="File too large") as caught:
        write_files(files)
    assert Path(caught.value.filename).name in ("large", "other")
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
    assert torch.equal(load_file(before.path)["data"], before.tensor)  # of the save before
