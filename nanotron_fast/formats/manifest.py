"""`nanotron_fast_manifest.json`: what the tensors of a checkpoint were when it was written.

It lies at the root of a checkpoint, in either format. For every file of tensors it has the size, a
digest of what is not a tensor's (the header), and for every tensor its dtype, shape, place and
SHA-256.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.json_file import read_json_object
from nanotron_fast.formats.sizes import is_size

NAME = "nanotron_fast_manifest.json"
_VERSION = 1
_HASH = "sha256"
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ManifestTensor:
    """A tensor of a file: dtype by its safetensors name, offsets from the start of the file.

    What is only known as bytes has neither dtype nor shape.
    """

    begin_bytes: int
    end_bytes: int
    sha256: str
    dtype: str | None = None
    shape: tuple[int, ...] | None = None

    @property
    def kind(self) -> str:
        """Dtype and shape, for people: "BF16 [32, 16]"."""
        return "bytes" if self.dtype is None else f"{self.dtype} {list(self.shape or ())}"


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """A file of tensors. `header_sha256` is of all its bytes that are not a tensor's."""

    size_bytes: int
    header_sha256: str
    tensors: Mapping[str, ManifestTensor]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files by their paths from the checkpoint's root."""

    tool_version: str
    files: Mapping[str, ManifestFile]

    def to_bytes(self) -> bytes:
        """The file's contents."""
        document = {
            "format_version": _VERSION,
            "tool_version": self.tool_version,
            "hash": _HASH,
            "files": {path: _file_document(file) for path, file in sorted(self.files.items())},
        }
        return (json.dumps(document, indent=1) + "\n").encode()


def _file_document(file: ManifestFile) -> dict[str, Any]:
    return {
        "size_bytes": file.size_bytes,
        "header_sha256": file.header_sha256,
        "tensors": {name: _tensor_document(each) for name, each in file.tensors.items()},
    }


def _tensor_document(tensor: ManifestTensor) -> dict[str, Any]:
    kind = {} if tensor.dtype is None else {"dtype": tensor.dtype, "shape": tensor.shape}
    offsets = [tensor.begin_bytes, tensor.end_bytes]
    return {**kind, "file_offsets": offsets, "sha256": tensor.sha256}


def read_manifest(root: Path) -> Manifest:
    """The manifest of a checkpoint. Raises CheckpointError, also where there is none; OSError."""
    path = root / NAME
    if not path.is_file():
        raise CheckpointError(
            f"{root}: it has no {NAME}, which `convert --manifest` writes; without one, name a "
            "second checkpoint to compare with"
        )
    document = read_json_object(path)
    if document.get("format_version") != _VERSION or document.get("hash") != _HASH:
        raise CheckpointError(
            f"{path}: format_version {document.get('format_version')!r} and hash "
            f"{document.get('hash')!r}, where {_VERSION} and {_HASH} can be read"
        )
    files = document.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path}: files is not an object")
    return Manifest(
        str(document.get("tool_version")),
        {name: _parse_file(f"{path}: {name}", name, each) for name, each in files.items()},
    )


def _parse_file(where: str, name: str, found: object) -> ManifestFile:
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or not name.isprintable():
        raise CheckpointError(f"{where}: it is not the path of a file in the checkpoint")
    if not isinstance(found, dict) or not isinstance(found.get("tensors"), dict):
        raise CheckpointError(f"{where}: it has no tensors")
    size = found.get("size_bytes")
    if not is_size(size):
        raise CheckpointError(f"{where}: size_bytes is {size!r}")
    tensors = {
        name: _parse_tensor(f"{where}: {name}", each, size)
        for name, each in found["tensors"].items()
    }
    position = 0
    for tensor in sorted(tensors.values(), key=lambda each: (each.begin_bytes, each.end_bytes)):
        if tensor.begin_bytes < position:
            raise CheckpointError(f"{where}: two tensors have byte {tensor.begin_bytes} in common")
        position = tensor.end_bytes
    return ManifestFile(size, _digest(where, found.get("header_sha256")), tensors)


def _parse_tensor(where: str, found: object, size: int) -> ManifestTensor:
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: it is not an object")
    offsets, dtype, shape = found.get("file_offsets"), found.get("dtype"), found.get("shape")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(is_size, offsets))):
        raise CheckpointError(f"{where}: file_offsets {offsets!r} are not two offsets")
    begin, end = offsets
    if not begin <= end <= size:
        raise CheckpointError(
            f"{where}: bytes {begin} to {end} do not lie in a file of {size} bytes"
        )
    if not (
        (dtype is None and shape is None)
        or (isinstance(dtype, str) and isinstance(shape, list) and all(map(is_size, shape)))
    ):
        raise CheckpointError(f"{where}: dtype {dtype!r} and shape {shape!r}")
    digest = _digest(where, found.get("sha256"))
    return ManifestTensor(begin, end, digest, dtype, None if shape is None else tuple(shape))


def _digest(where: str, found: object) -> str:
    if not isinstance(found, str) or not _DIGEST.fullmatch(found):
        raise CheckpointError(f"{where}: {found!r} is not a SHA-256")
    return found
