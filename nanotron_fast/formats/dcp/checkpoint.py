"""A folder of torch.distributed.checkpoint: its tensors, and where their bytes lie.

Each item of a tensor is a file of torch.save's within a `.distcp` file, or, where the writer was
told so, a tensor of the safetensors file that the `.distcp` file is then.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

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

_ZIP = b"PK\x03\x04"


@dataclass(frozen=True, slots=True)
class DcpCheckpoint:
    """What is in a folder, from its `.metadata` alone.

    `others` are the names of what is no tensor: counters, a schedule, a data loader's state.
    """

    root: Path
    tensors: dict[str, ChunkedTensor]
    others: tuple[str, ...]

    def locate(self, names: Iterable[str]) -> dict[str, tuple[Chunk, ...]]:
        """Where the elements of tensors lie. Reads what `.distcp` files say of each chunk.

        Raises CheckpointError where chunks do not fill a tensor, or a file does not hold what
        `.metadata` says; OSError.
        """
        locator = _Locator(self.root)
        return {name: locator.locate(name, self.tensors[name]) for name in names}


def read_dcp(root: Path) -> DcpCheckpoint:
    """Reads `.metadata`. Raises CheckpointError, OSError."""
    metadata = read_metadata(root)
    return DcpCheckpoint(root, metadata.tensors, metadata.others)


class _Locator:
    def __init__(self, root: Path) -> None:
        self._root = root
        # Of the files that are safetensors files; None for the others.
        self._headers: dict[str, Header | None] = {}

    def locate(self, name: str, tensor: ChunkedTensor) -> tuple[Chunk, ...]:
        boxes = [
            Bounds(chunk.low, tuple(map(sum, zip(chunk.low, chunk.sizes, strict=True))))
            for chunk in tensor.chunks
        ]
        problem = filling_problem(tensor.shape, boxes)
        if problem is not None:
            raise CheckpointError(f"{self._root / METADATA}: {name}: {problem}")
        return tuple(self._chunk(name, tensor, chunk) for chunk in tensor.chunks)

    def _chunk(self, name: str, tensor: ChunkedTensor, chunk: StoredChunk) -> Chunk:
        place = chunk.place
        path = self._root / place.file
        if place.transforms:
            raise CheckpointError(
                f"{path}: {name} at byte {place.offset_bytes} was written through "
                f"{', '.join(place.transforms)}, which is not read. Save it without extensions"
            )
        try:
            header = self._header(place.file)
            if header is None:
                found = read_torch_file(
                    path, offset_bytes=place.offset_bytes, size_bytes=place.size_bytes
                )
            else:
                found = _in_header(header, name)
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: no such file, and {METADATA} places {name} there"
            ) from None
        where = f"{path}: at byte {place.offset_bytes}"
        if not isinstance(found, StoredTensor):
            raise CheckpointError(f"{where} is not a tensor, and {METADATA} places {name} there")
        if (found.dtype, found.shape) != (tensor.dtype, chunk.sizes):
            raise CheckpointError(
                f"{where} is a tensor of {found.dtype} {list(found.shape)}, and {METADATA} places "
                f"{tensor.dtype} {list(chunk.sizes)} of {name} there"
            )
        return Chunk(path, found.offset_bytes, chunk.low, chunk.sizes, found.strides)

    def _header(self, file: str) -> Header | None:
        if file not in self._headers:
            path = self._root / file
            with open_plain(path) as opened:
                is_zip = opened.read(len(_ZIP)) == _ZIP
            # Items that are no tensors come first, and may begin with anything.
            self._headers[file] = None if is_zip else _try_header(path)
        return self._headers[file]


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
