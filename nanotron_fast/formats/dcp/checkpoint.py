"""A folder of torch.distributed.checkpoint: its tensors, and where their bytes lie.

Each item of a tensor is a file of torch.save's within a `.distcp` file, or, where the writer was
told so, a tensor of the safetensors file that the `.distcp` file is then.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.chunks import Chunk, filling_problem
from nanotron_fast.formats.dcp import METADATA
from nanotron_fast.formats.dcp.metadata import (
    ChunkedTensor,
    StoredChunk,
    read_metadata,
)
from nanotron_fast.formats.plain_file import open_plain
from nanotron_fast.formats.safetensors import Header, read_header
from nanotron_fast.formats.torch_file import StoredTensor, read_torch_file
from nanotron_fast.moves.boxes import Bounds, row_major
from nanotron_fast.moves.files import FileState, ReadFile

_ZIP = b"PK\x03\x04"
_DOCUMENT = b"/data.pkl"
_MAX_BEGINNING_BYTES = 8192


class Located(NamedTuple):
    """The chunks of tensors, by name, and what each file was when it was read."""

    chunks: dict[str, tuple[Chunk, ...]]
    read: dict[Path, ReadFile]


@dataclass(frozen=True, slots=True)
class DcpCheckpoint:
    """What is in a folder, from its `.metadata` alone.

    `others` are the names of what is no tensor: counters, a schedule, a data loader's state.
    """

    root: Path
    tensors: dict[str, ChunkedTensor]
    others: tuple[str, ...]
    # Of `.metadata`.
    digest: str

    def locate(self, names: Iterable[str]) -> Located:
        """Where the elements of tensors lie. Reads what `.distcp` files say of each chunk.

        Raises CheckpointError where chunks do not fill a tensor, or a file does not hold what
        `.metadata` says; OSError.
        """
        found: dict[str, list[Chunk | None]] = {}
        # File by file, so that each is opened once.
        wanted: dict[str, list[tuple[str, int]]] = {}
        for name in names:
            tensor = self.tensors[name]
            boxes = [Bounds(chunk.low, chunk.high) for chunk in tensor.chunks]
            problem = filling_problem(tensor.shape, boxes)
            if problem is not None:
                raise CheckpointError(f"{self.root / METADATA}: {name}: {problem}")
            found[name] = [None] * len(boxes)
            for index, chunk in enumerate(tensor.chunks):
                wanted.setdefault(chunk.place.file, []).append((name, index))
        known = _Known()
        read: dict[Path, ReadFile] = {}
        for file, items in wanted.items():
            with _Items(self.root / file, items[0][0], known) as reader:
                for name, index in items:
                    tensor = self.tensors[name]
                    found[name][index] = reader.chunk(name, tensor, tensor.chunks[index])
                read[reader.path] = ReadFile(reader.state, self.digest)
        return Located({name: tuple(filter(None, chunks)) for name, chunks in found.items()}, read)


def read_dcp(root: Path) -> DcpCheckpoint:
    """Reads `.metadata`. Raises CheckpointError, OSError."""
    metadata = read_metadata(root)
    return DcpCheckpoint(root, metadata.tensors, metadata.others, metadata.digest)


class _Beginning(NamedTuple):
    """The bytes of an item before its tensor, and the strides that they say it has."""

    data: bytes
    strides: tuple[int, ...]


class _Known:
    """Beginnings of items that were read, by what the item is.

    Those that torch writes of shards of one shape are equal, byte for byte. So most items need not
    be read as the archives that they are: what says where the tensor lies comes before it.
    """

    def __init__(self) -> None:
        self._beginnings: dict[tuple[str, tuple[int, ...], int], _Beginning] = {}

    def of(self, dtype: str, chunk: StoredChunk) -> _Beginning | None:
        return self._beginnings.get((dtype, chunk.sizes, chunk.place.size_bytes))

    def add(self, dtype: str, chunk: StoredChunk, beginning: _Beginning) -> None:
        self._beginnings[dtype, chunk.sizes, chunk.place.size_bytes] = beginning


class _Items:
    """The items of one `.distcp` file. `name` is that of a tensor that should be in it."""

    def __init__(self, path: Path, name: str, known: _Known) -> None:
        self.path, self._known = path, known
        try:
            self._file = open_plain(path)
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: no such file, and {METADATA} places {name} there"
            ) from None
        self.state = FileState.of(os.fstat(self._file.fileno()))
        # Items that are no tensors come first, and may begin with anything.
        is_zip = self._read(0, len(_ZIP)) == _ZIP
        self._header = None if is_zip else _try_header(path)

    def __enter__(self) -> _Items:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self, at: int, size: int) -> bytes:
        """Bytes that are there: fewer than `size` where the file ends."""
        return os.pread(self._file.fileno(), size, at)

    def chunk(self, name: str, tensor: ChunkedTensor, chunk: StoredChunk) -> Chunk:
        """Raises CheckpointError where something else lies there, OSError."""
        place, path = chunk.place, self.path
        if place.transforms:
            raise CheckpointError(
                f"{path}: {name} at byte {place.offset_bytes} was written through "
                f"{', '.join(place.transforms)}, which is not read. Save it without extensions"
            )
        known = self._known.of(tensor.dtype, chunk)
        if (
            known is not None
            and place.offset_bytes + place.size_bytes <= self.state.size_bytes
            and self._read(place.offset_bytes, len(known.data)) == known.data
        ):
            begin = place.offset_bytes + len(known.data)
            return Chunk(path, begin, chunk.low, chunk.sizes, known.strides)
        found = self._stored(name, chunk)
        where = f"{path}: at byte {place.offset_bytes}"
        if not isinstance(found, StoredTensor):
            raise CheckpointError(f"{where} is not a tensor, and {METADATA} places {name} there")
        if (found.dtype, found.shape) != (tensor.dtype, chunk.sizes):
            raise CheckpointError(
                f"{where} is a tensor of {found.dtype} {list(found.shape)}, and {METADATA} places "
                f"{tensor.dtype} {list(chunk.sizes)} of {name} there"
            )
        if self._header is None:
            self._remember(tensor.dtype, chunk, found)
        return Chunk(path, found.offset_bytes, chunk.low, chunk.sizes, found.strides)

    def _stored(self, name: str, chunk: StoredChunk) -> Any:
        place = chunk.place
        if self._header is not None:
            return _in_header(self._header, name)
        return read_torch_file(
            self.path, offset_bytes=place.offset_bytes, size_bytes=place.size_bytes
        )

    def _remember(self, dtype: str, chunk: StoredChunk, found: StoredTensor) -> None:
        at = chunk.place.offset_bytes
        size = found.offset_bytes - at
        if not 0 < size <= _MAX_BEGINNING_BYTES:
            return
        data = self._read(at, size)
        # The document says which record is the tensor's, and that record's header where it lies.
        if len(data) == size and _DOCUMENT in data:
            self._known.add(dtype, chunk, _Beginning(data, found.strides))


def _try_header(path: Path) -> Header | None:
    try:
        return read_header(path)
    except CheckpointError:
        return None


def _in_header(header: Header, name: str) -> StoredTensor:
    info = header.tensors.get(name)
    if info is None:
        raise CheckpointError(f"{header.path}: {name} is not in it, where {METADATA} places it")
    return StoredTensor(
        header.path, info.begin_bytes, info.dtype, info.shape, row_major(info.shape)
    )
