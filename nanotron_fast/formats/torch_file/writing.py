"""Laying out the file that torch.save would write of a document, without torch.

The tensors' elements are not there yet: the layout says where each tensor lies, and all other
bytes. Each tensor is a record of its own and begins at a multiple of 64 bytes, as in torch's files,
so that torch.load can map it into memory. A zip file has a checksum of each record, which can be
known only when its bytes are there: the layout says which bytes it is of, and where it stands.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.torch_file.archive import (
    CENTRAL,
    CENTRAL_SIGNATURE,
    END,
    END_64,
    END_64_SIGNATURE,
    END_SIGNATURE,
    EXTRA_64,
    IN_EXTRA_16,
    IN_EXTRA_32,
    LOCAL,
    LOCAL_SIGNATURE,
    LOCATOR_64,
    LOCATOR_64_SIGNATURE,
)
from nanotron_fast.moves.checksums import Checksum
from nanotron_fast.moves.dtypes import Dtype

_ROOT = "archive"
_ALIGNMENT_BYTES = 64
# The extra field that fills up to the alignment; torch's has the same number, "FB".
_PADDING = 0x4246
# Version 2.0 of the zip format, and 4.5 for sizes of 64 bits. Names are UTF-8. 1980-01-01.
_NEEDED, _NEEDED_64, _UTF_8, _DATE = 20, 45, 0x0800, 0x0021
_CRC_IN_LOCAL, _CRC_IN_CENTRAL = 14, 16
_STORAGES = {
    Dtype.F32: b"FloatStorage",
    Dtype.F64: b"DoubleStorage",
    Dtype.F16: b"HalfStorage",
    Dtype.BF16: b"BFloat16Storage",
}


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor in a document that is to be written: in C order, without gaps.

    `key` is how the caller finds it in the layout, and unlike that of others in the document.
    `data` are its bytes where they are known already.
    """

    key: Hashable
    dtype: Dtype
    shape: tuple[int, ...]
    data: bytes | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Layout:
    """A file of which all bytes are known but those of its tensors, and their checksums.

    Attributes:
        literals: (offset, bytes), in order; what lies between two of them is a tensor.
        offsets: of the tensors whose bytes are not known, by their keys.
        checksums: of those tensors.
        size_bytes: of the file.
    """

    literals: tuple[tuple[int, bytes], ...]
    offsets: Mapping[Hashable, int]
    checksums: tuple[Checksum, ...]
    size_bytes: int


def lay_out(document: Any) -> Layout:
    """The file of a document: of dictionaries, lists, tuples, text, numbers and NewTensor.

    Raises CheckpointError where the document holds something else.
    """
    pickler = _Pickler()
    pickler.write(document)
    data = b"\x80\x02" + b"".join(pickler.parts) + b"."
    archive = _Archive()
    archive.add("data.pkl", data)
    archive.add("byteorder", b"little")
    for index, tensor in enumerate(pickler.tensors):
        archive.add(f"data/{index}", tensor)
    archive.add("version", b"3\n")
    return archive.finish()


class _Pickler:
    """Writes the pickle that torch.save would, without its memory of what was written before."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.tensors: list[NewTensor] = []

    def write(self, value: Any) -> None:
        add = self.parts.append
        if value is None:
            add(b"N")
        elif isinstance(value, bool):
            add(b"\x88" if value else b"\x89")
        elif isinstance(value, int):
            add(_integer(value))
        elif isinstance(value, float):
            add(b"G" + struct.pack(">d", value))
        elif isinstance(value, str):
            add(_text(value))
        elif isinstance(value, tuple):
            add(b"(")
            self._write_all(*value)
            add(b"t")
        elif isinstance(value, list):
            add(b"](")
            self._write_all(*value)
            add(b"e")
        elif isinstance(value, dict):
            add(b"}(")
            for key, each in value.items():
                self._write_all(key, each)
            add(b"u")
        elif isinstance(value, NewTensor):
            self._write_tensor(value)
        else:
            raise CheckpointError(f"a {type(value).__name__} is not written into a file of torch's")

    def _write_all(self, *values: Any) -> None:
        for value in values:
            self.write(value)

    def _write_tensor(self, tensor: NewTensor) -> None:
        name, count = str(len(self.tensors)), math.prod(tensor.shape)
        self.tensors.append(tensor)
        strides, stride = [], 1
        for size in reversed(tensor.shape):
            strides.append(stride)
            stride *= max(size, 1)
        self.parts += (
            b"ctorch._utils\n_rebuild_tensor_v2\n((",
            _text("storage"),
            b"ctorch\n" + _STORAGES[tensor.dtype] + b"\n",
            _text(name),
            _text("cpu"),
            _integer(count),
            b"tQ",
            _integer(0),
            *(b"(", *map(_integer, tensor.shape), b"t"),
            *(b"(", *map(_integer, reversed(strides)), b"t"),
            b"\x89ccollections\nOrderedDict\n)RtR",
        )


# The files of many ranks hold the same names and sizes.
@lru_cache(maxsize=1 << 14)
def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<L", len(raw)) + raw


@lru_cache(maxsize=1 << 14)
def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return b"K" + bytes([value])
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<l", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


class _Archive:
    """A zip file that grows: literal bytes, and room for those that are not there yet."""

    def __init__(self) -> None:
        self._literals: list[tuple[int, bytearray]] = [(0, bytearray())]
        self._at = 0
        self._offsets: dict[Hashable, int] = {}
        # Of each record: its name, where its header lies, its size, its checksum where known.
        self._records: list[tuple[bytes, int, int, int | None]] = []

    def add(self, name: str, data: bytes | NewTensor) -> None:
        """Adds a record; of a tensor without its bytes, room for them."""
        contents = data.data if isinstance(data, NewTensor) else data
        size = data.num_bytes if isinstance(data, NewTensor) else len(data)
        if contents is not None and len(contents) != size:
            raise CheckpointError(f"{len(contents)} bytes are given for a tensor of {size}")
        checksum = None if contents is None and size else zlib.crc32(contents or b"")
        raw = f"{_ROOT}/{name}".encode()
        is_wide = size >= IN_EXTRA_32
        extra = struct.pack("<2H2Q", EXTRA_64, 16, size, size) if is_wide else b""
        start = self._at + LOCAL.size + len(raw) + len(extra) + 4
        padding = -start % _ALIGNMENT_BYTES
        extra += struct.pack("<2H", _PADDING, padding) + bytes(padding)
        told = IN_EXTRA_32 if is_wide else size
        needed = _NEEDED_64 if is_wide else _NEEDED
        self._records.append((raw, self._at, size, checksum))
        self._write(
            LOCAL.pack(
                *(LOCAL_SIGNATURE, needed, _UTF_8, 0, 0, _DATE),
                *(checksum or 0, told, told, len(raw), len(extra)),
            )
        )
        self._write(raw + extra)
        if isinstance(data, NewTensor) and contents is None:
            if data.key in self._offsets:
                raise CheckpointError(f"two tensors of a document have the key {data.key!r}")
            self._offsets[data.key] = self._at
            if size:
                self._at += size
                self._literals.append((self._at, bytearray()))
        else:
            self._write(contents or b"")

    def _write(self, data: bytes) -> None:
        self._literals[-1][1].extend(data)
        self._at += len(data)

    def finish(self) -> Layout:
        start = self._at
        checksums: list[Checksum] = []
        for name, header, size, checksum in self._records:
            if checksum is None:
                # Behind the header; the data begins at the alignment.
                begin = self._data_of(header, len(name), size)
                at = (header + _CRC_IN_LOCAL, self._at + _CRC_IN_CENTRAL)
                checksums.append(Checksum(begin, size, at))
            wide = [number for number in (size, size) if size >= IN_EXTRA_32]
            wide += [header] if header >= IN_EXTRA_32 else []
            extra = struct.pack(f"<2H{len(wide)}Q", EXTRA_64, 8 * len(wide), *wide) if wide else b""
            needed = _NEEDED_64 if wide else _NEEDED
            told = min(size, IN_EXTRA_32)
            self._write(
                CENTRAL.pack(
                    *(CENTRAL_SIGNATURE, needed, needed, _UTF_8, 0, 0, _DATE),
                    *(checksum or 0, told, told, len(name), len(extra), 0, 0, 0, 0),
                    min(header, IN_EXTRA_32),
                )
            )
            self._write(name + extra)
        self._write_end(start)
        literals = tuple((at, bytes(data)) for at, data in self._literals)
        return Layout(literals, self._offsets, tuple(checksums), self._at)

    def _data_of(self, header: int, name_bytes: int, size: int) -> int:
        extra = 20 if size >= IN_EXTRA_32 else 0
        start = header + LOCAL.size + name_bytes + extra + 4
        return start + -start % _ALIGNMENT_BYTES

    def _write_end(self, start: int) -> None:
        """The end of the directory; the one with wide numbers before it, where they are needed."""
        count, size, behind = len(self._records), self._at - start, self._at
        if count >= IN_EXTRA_16 or start >= IN_EXTRA_32 or size >= IN_EXTRA_32:
            fixed = (END_64_SIGNATURE, END_64.size - 12, _NEEDED_64, _NEEDED_64, 0, 0)
            self._write(END_64.pack(*fixed, count, count, size, start))
            self._write(LOCATOR_64.pack(LOCATOR_64_SIGNATURE, 0, behind, 1))
        few = min(count, IN_EXTRA_16)
        self._write(
            END.pack(
                *(END_SIGNATURE, 0, 0, few, few),
                *(min(size, IN_EXTRA_32), min(start, IN_EXTRA_32), 0),
            )
        )
