"""Reading and writing the header of a safetensors file.

A file is: 8 bytes, the header's length as a little-endian integer; the header, a JSON object
padded with spaces; the tensors' bytes. The header maps each name to `{"dtype", "shape",
"data_offsets": [begin, end]}`, counted from the end of the header, and `__metadata__` to strings.
The reader is as strict as the safetensors library: the tensors fill the rest of the file
without a hole or an overlap. Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.lfs import HINT, is_pointer
from nanotron_fast.formats.plain_file import open_plain
from nanotron_fast.formats.sizes import MAX_DIMS, MAX_SIZE, is_size
from nanotron_fast.moves.dtypes import SAFETENSORS_BITS, Dtype
from nanotron_fast.moves.files import FileState, ReadFile

_MAX_HEADER_BYTES = 100_000_000
# Tensors start on a page: writes that begin inside one make the page cache work twice on it.
_ALIGNMENT_BYTES = 4096
# What a message repeats of a name or of a value.
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: dtype by its safetensors name, offsets from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin_bytes: int
    end_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says it holds."""

    path: Path
    tensors: dict[str, TensorInfo]
    # What the file was when it was read.
    read: ReadFile
    metadata: dict[str, str] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """Reads and checks the header of a file, and nothing else. Raises CheckpointError, OSError."""
    with open_plain(path) as file:
        state = FileState.of(os.fstat(file.fileno()))
        file_bytes = state.size_bytes
        prefix = file.read(64)
        if is_pointer(prefix):
            raise CheckpointError(f"{path}: {HINT}")
        prefix = prefix[:8]
        file.seek(len(prefix))
        if len(prefix) < 8:
            raise CheckpointError(
                f"{path}: {file_bytes} bytes are too few for a safetensors header"
            )
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > _MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: a header of {header_bytes} bytes is over the limit of "
                f"{_MAX_HEADER_BYTES}; this is not a safetensors file"
            )
        data_start = 8 + header_bytes
        if data_start > file_bytes:
            raise CheckpointError(
                f"{path}: the header ends at byte {data_start} of a file of {file_bytes}: truncated"
            )
        raw = file.read(header_bytes)
        while len(raw) < header_bytes:
            more = file.read(header_bytes - len(raw))
            if not more:
                raise CheckpointError(f"{path}: the file shrank while its header was read")
            raw += more
    return _parse_header(path, raw, data_start, state)


def header_of(path: Path, start: bytes, file_bytes: int) -> Header:
    """The header of a file that starts with these bytes, as `build_header` makes them.

    Raises CheckpointError.
    """
    return _parse_header(path, start[8:], len(start), FileState(0, 0, file_bytes, 0))


def _parse_header(path: Path, raw: bytes, data_start: int, state: FileState) -> Header:
    document = _parse_json(path, raw)
    metadata = document.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise CheckpointError(f"{path}: __metadata__ does not map strings to strings")
    tensors = {
        name: _parse_tensor(path, name, entry, data_start) for name, entry in document.items()
    }
    _check_coverage(path, tensors, data_start, state.size_bytes)
    read = ReadFile(state, hashlib.sha256(raw).hexdigest())
    return Header(path, tensors, read, metadata or {})


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{path}: the header does not start with '{{'")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: the header is not UTF-8 at byte {error.start}") from None

    def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice = next(name for name, count in counts.items() if count > 1)
            raise CheckpointError(f"{path}: the header names {twice[:_SHOWN]!r} twice")
        return result

    try:
        document = json.loads(text, object_pairs_hook=reject_duplicates)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: the header is not JSON: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{path}: the header is nested too deeply") from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        # Python's own limit on the digits of an integer.
        raise CheckpointError(f"{path}: the header holds a number that is too long") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    return document


def _parse_tensor(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    if not name.isprintable():
        raise CheckpointError(f"{path}: {name[:_SHOWN]!r} is not a tensor's name")
    # Further keys are left alone, as by the safetensors library since 0.8.
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise CheckpointError(f"{path}: {name}: an entry has dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_BITS:
        raise CheckpointError(f"{path}: {name}: unknown dtype {_told(dtype)}")
    if not isinstance(shape, list) or not all(is_size(size) for size in shape):
        raise CheckpointError(f"{path}: {name}: shape {_told(shape)} is not a list of sizes")
    if len(shape) > MAX_DIMS:
        raise CheckpointError(
            f"{path}: {name}: {len(shape):,} dimensions are over the limit of {MAX_DIMS}"
        )
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(is_size, offsets))):
        raise CheckpointError(f"{path}: {name}: data_offsets {_told(offsets)} are not two offsets")
    begin, end = offsets
    num_bits = math.prod(shape) * SAFETENSORS_BITS[dtype]
    if num_bits > MAX_SIZE:
        raise CheckpointError(f"{path}: {name}: shape {shape} overflows")
    if num_bits % 8 or end - begin != num_bits // 8:
        raise CheckpointError(
            f"{path}: {name}: {dtype} of shape {shape} takes {num_bits / 8:g} bytes, "
            f"its offsets {begin} to {end} give it {end - begin}"
        )
    return TensorInfo(dtype, tuple(shape), data_start + begin, data_start + end)


def _told(value: object) -> str:
    """What a message repeats of a value, which may be anything, and of any size."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _check_coverage(
    path: Path, tensors: Mapping[str, TensorInfo], data_start: int, file_bytes: int
) -> None:
    position = data_start
    for name, info in sorted(
        tensors.items(), key=lambda item: (item[1].begin_bytes, item[1].end_bytes)
    ):
        if info.begin_bytes < position:
            raise CheckpointError(
                f"{path}: {name} starts at byte {info.begin_bytes}, inside the tensor before it, "
                f"which ends at {position}"
            )
        if info.begin_bytes > position:
            raise CheckpointError(
                f"{path}: bytes {position} to {info.begin_bytes}, before {name}, belong to no "
                "tensor"
            )
        position = info.end_bytes
    if position > file_bytes:
        raise CheckpointError(
            f"{path}: the tensors end at byte {position} of a file of {file_bytes}: truncated"
        )
    if position < file_bytes:
        raise CheckpointError(f"{path}: the last {file_bytes - position} bytes belong to no tensor")


def build_header(
    tensors: Sequence[tuple[str, Dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file that holds these tensors one after another, in this order.

    Returns the header with its length prefix, and the offset in bytes at which each tensor starts,
    counted from the start of the file.
    """
    document: dict[str, Any] = {"__metadata__": dict(metadata)}
    relative: dict[str, int] = {}
    position = 0
    for name, dtype, shape in tensors:
        num_bytes = math.prod(shape) * dtype.itemsize
        relative[name] = position
        document[name] = {
            "dtype": dtype.name,
            "shape": list(shape),
            "data_offsets": [position, position + num_bytes],
        }
        position += num_bytes
    raw = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-(8 + len(raw)) % _ALIGNMENT_BYTES)
    start = 8 + len(raw)
    return len(raw).to_bytes(8, "little") + raw, {
        name: start + offset for name, offset in relative.items()
    }
