"""The directory of the zip file that torch.save writes: where each record's bytes lie.

The archive may be a range of a larger file. Records are stored as they are, so a record is a range
as well; one that is compressed or encrypted is refused. Source: the zip format's application note
(APPNOTE.TXT 6.3.9), sections 4.3 and 4.5.3, and caffe2/serialize/inline_container.cc of PyTorch.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.lfs import HINT, is_pointer

# A directory has some 70 bytes for each record.
MAX_DIRECTORY_BYTES = 64 << 20

LOCAL = struct.Struct("<4s5H3L2H")
LOCAL_SIGNATURE = b"PK\x03\x04"
CENTRAL = struct.Struct("<4s6H3L5H2L")
CENTRAL_SIGNATURE = b"PK\x01\x02"
END = struct.Struct("<4s4H2LH")
END_SIGNATURE = b"PK\x05\x06"
END_64 = struct.Struct("<4sQ2H2L4Q")
END_64_SIGNATURE = b"PK\x06\x06"
LOCATOR_64 = struct.Struct("<4sLQL")
LOCATOR_64_SIGNATURE = b"PK\x06\x07"
# A field of 32 or 16 bits that says: the number is in the extra field, which has 64.
IN_EXTRA_32, IN_EXTRA_16 = 0xFFFFFFFF, 0xFFFF
EXTRA_64 = 1
# Behind a record whose header does not tell its size.
_DESCRIPTOR_SIGNATURE = b"PK\x07\x08"

_MAX_COMMENT_BYTES = 0xFFFF
_ENCRYPTED = 0x2041
# How a file begins that torch wrote before version 1.6, or was told to write in the same way.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a record's header lies, from the start of the archive, and how long its data is."""

    header_bytes: int
    size_bytes: int


class CutOff(CheckpointError):
    """The end of an archive is missing; `archive` can be asked for how it begins."""

    def __init__(self, archive: Archive) -> None:
        super().__init__(
            f"{archive.where}: it was cut off, or not written to its end: it has "
            f"{archive.size_bytes:,} bytes, and the directory of its records, which comes last, is "
            "missing"
        )
        self.archive = archive


class Archive:
    """The records of an archive, by their names.

    Args:
        file: opened for reading; it is read at positions alone.
        path: what messages call it.
        offset_bytes, size_bytes: the range of the file that the archive is; to the file's end
            where no size is given.

    Raises CheckpointError where the range is not a whole zip file, which is CutOff where it is the
    beginning of one; OSError.
    """

    def __init__(
        self, file: BinaryIO, path: Path, *, offset_bytes: int = 0, size_bytes: int | None = None
    ) -> None:
        self._file, self.path, self._start = file, path, offset_bytes
        file_bytes = os.fstat(file.fileno()).st_size
        self._size = file_bytes - offset_bytes if size_bytes is None else size_bytes
        if offset_bytes < 0 or self._size < 0 or offset_bytes + self._size > file_bytes:
            raise CheckpointError(
                f"{path}: bytes {offset_bytes} to {offset_bytes + self._size} are wanted of a file "
                f"of {file_bytes}: truncated"
            )
        self.where = f"{path}" if size_bytes is None else f"{path}, at byte {offset_bytes}"
        self._directory = 0
        self._entries = self._read_directory()

    @property
    def size_bytes(self) -> int:
        """Of the archive."""
        return self._size

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    @property
    def root(self) -> str:
        """The folder that all records lie in. Raises CheckpointError where there is none."""
        found = [name for name in self._entries if name.endswith("/data.pkl")]
        if any("/code/" in name or name.endswith("/constants.pkl") for name in self._entries):
            raise self.error("it is a TorchScript program, not what torch.save writes")
        if len(found) != 1:
            raise self.error(
                "it is a zip file without a data.pkl, not what torch.save writes"
                if not found
                else f"it holds {len(found)} records of the name data.pkl, and should hold one"
            )
        return found[0].removesuffix("/data.pkl")

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {problem}")

    def size_of(self, name: str) -> int:
        """Bytes of a record. Raises CheckpointError where there is none of that name."""
        if name not in self._entries:
            raise self.error(f"it has no record {name[:200]!r}")
        return self._entries[name].size_bytes

    def offset_of(self, name: str) -> int:
        """Where a record's bytes begin in the file. Raises CheckpointError, OSError."""
        size = self.size_of(name)
        at = self._entries[name].header_bytes
        if at + LOCAL.size > self._directory:
            raise self.error(f"the record {name!r} begins at byte {at}, behind the records")
        expected = name.encode()
        # The header with its name at once: a file has thousands of records.
        head = self._read(at, min(LOCAL.size + len(expected), self._directory - at))
        fields = LOCAL.unpack_from(head)
        start = at + LOCAL.size + fields[9] + fields[10]
        if fields[0] != LOCAL_SIGNATURE:
            raise self.error(f"at byte {at} there is no header of the record {name!r}")
        stored = head[LOCAL.size :]
        if fields[9] != len(expected) or stored != expected:
            raise self.error(
                f"at byte {at} is the header of the record {stored[:80]!r}, not of {name!r}"
            )
        if start + size > self._directory:
            raise self.error(
                f"the record {name!r} ends at byte {start + size}, behind the records' end at "
                f"{self._directory}"
            )
        return self._start + start

    def read(self, name: str, *, at_most: int) -> bytes:
        """A whole record. Raises CheckpointError where it is longer than `at_most`, OSError."""
        size = self.size_of(name)
        if size > at_most:
            raise self.error(
                f"the record {name!r} of {size:,} bytes is over the limit of {at_most:,}"
            )
        return self._read(self.offset_of(name) - self._start, size)

    def first(self, *, at_most: int) -> bytes | None:
        """The record that the archive begins with, where it is whole, whatever became of the rest.

        None where it is not, and where it is longer than `at_most`. Raises OSError.
        """
        data = self._read(0, min(self._size, at_most))
        if len(data) < LOCAL.size:
            return None
        fields = LOCAL.unpack_from(data)
        checksum, size = fields[6], fields[8]
        start = LOCAL.size + fields[9] + fields[10]
        if not size:
            end = data.find(_DESCRIPTOR_SIGNATURE, start)
            checksum, size = int.from_bytes(data[end + 4 : end + 8], "little"), end - start
        record = data[start : start + max(size, 0)]
        return record if len(record) == size > 0 and zlib.crc32(record) == checksum else None

    def _read(self, at: int, size: int) -> bytes:
        if at < 0 or at + size > self._size:
            raise self.error(
                f"it speaks of bytes {at} to {at + size}, and has {self._size}: damaged"
            )
        parts = []
        while size > 0:
            part = os.pread(self._file.fileno(), size, self._start + at)
            if not part:
                raise self.error("the file shrank while it was read")
            parts.append(part)
            at += len(part)
            size -= len(part)
        return b"".join(parts)

    def _read_directory(self) -> dict[str, _Entry]:
        begins = self._read(0, min(self._size, 64))
        if not begins:
            raise self.error("it is empty, and torch.save writes a zip file")
        if is_pointer(begins):
            raise self.error(HINT)
        if begins.startswith(_LEGACY[: max(len(begins), 2)]):
            raise self.error(
                "it is in the format of torch before 1.6: load it with torch.load and write it "
                "again with torch.save"
            )
        if LOCAL_SIGNATURE.startswith(begins):
            raise CutOff(self)
        if not begins.startswith(LOCAL_SIGNATURE):
            raise self.error("it is not a zip file, which torch.save writes")
        count, size, offset, behind = self._end()
        if offset + size != behind:
            raise self.error(
                f"its directory of {size} bytes at byte {offset} does not end at byte {behind}, "
                "where its end is written"
            )
        if size > MAX_DIRECTORY_BYTES:
            raise self.error(
                f"a directory of {size:,} bytes is over the limit of {MAX_DIRECTORY_BYTES:,}"
            )
        if count * CENTRAL.size > size:
            raise self.error(f"a directory of {size} bytes cannot name {count} records")
        self._directory = offset
        return self._entries_in(self._read(offset, size), count)

    def _end(self) -> tuple[int, int, int, int]:
        """Number of records, size and place of the directory, and where that should end."""
        low = max(0, self._size - END.size - _MAX_COMMENT_BYTES)
        tail = self._read(low, self._size - low)
        at = tail.rfind(END_SIGNATURE, 0, max(0, len(tail) - END.size) + len(END_SIGNATURE))
        if at < 0:
            raise CutOff(self)
        at += low
        fields = END.unpack(self._read(at, END.size))
        if fields[1] or fields[2]:
            raise self.error("it is one part of a zip file in several")
        if at + END.size + fields[7] != self._size:
            raise self.error(
                f"{self._size - at - END.size} bytes follow its directory, and it says "
                f"{fields[7]}: truncated or damaged"
            )
        count, size, offset = fields[4:7]
        before = at - LOCATOR_64.size
        locator = self._read(before, LOCATOR_64.size) if before >= 0 else b""
        if locator.startswith(LOCATOR_64_SIGNATURE):
            at = LOCATOR_64.unpack(locator)[2]
            if at + END_64.size > before:
                raise self.error(f"the end of its directory is not at byte {at}: damaged")
            fields = END_64.unpack(self._read(at, END_64.size))
            if fields[0] != END_64_SIGNATURE:
                raise self.error(f"the end of its directory is not at byte {at}: damaged")
            count, size, offset = fields[7:10]
        return count, size, offset, at

    def _entries_in(self, raw: bytes, count: int) -> dict[str, _Entry]:
        entries: dict[str, _Entry] = {}
        at = 0
        for _ in range(count):
            if at + CENTRAL.size > len(raw):
                raise self.error("its directory is shorter than it says: damaged")
            fields = CENTRAL.unpack_from(raw, at)
            signature, flags, method = fields[0], fields[3], fields[4]
            packed, size, header = fields[8], fields[9], fields[16]
            name_at = at + CENTRAL.size
            extra_at = name_at + fields[10]
            at = extra_at + fields[11] + fields[12]
            if signature != CENTRAL_SIGNATURE or at > len(raw):
                raise self.error("its directory is damaged")
            name = self._name(raw[name_at:extra_at])
            extra = raw[extra_at : extra_at + fields[11]]
            size, packed, header = self._with_extra(name, extra, [size, packed, header])
            if flags & _ENCRYPTED:
                raise self.error(f"the record {name!r} is encrypted")
            if method != 0 or packed != size:
                raise self.error(
                    f"the record {name!r} is compressed, which torch.save never does: unpack it, "
                    "and pack it again without compression (zip -0)"
                )
            if name in entries:
                raise self.error(f"it has two records of the name {name!r}")
            entries[name] = _Entry(header, size)
        if at != len(raw):
            raise self.error(f"{len(raw) - at} bytes of its directory belong to no record")
        return entries

    def _name(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.error(f"the name of a record, {raw[:80]!r}, is not UTF-8") from None

    def _with_extra(self, name: str, extra: bytes, numbers: list[int]) -> list[int]:
        """Those numbers that do not fit into 32 bits are in the extra field, in their order."""
        at = 0
        while at + 4 <= len(extra) and IN_EXTRA_32 in numbers:
            kind, length = struct.unpack_from("<2H", extra, at)
            if kind == EXTRA_64:
                wide = extra[at + 4 : at + 4 + length]
                for index, number in enumerate(numbers):
                    if number == IN_EXTRA_32:
                        if len(wide) < 8:
                            raise self.error(f"the sizes of the record {name!r} are missing")
                        numbers[index] = int.from_bytes(wide[:8], "little")
                        wide = wide[8:]
                break
            at += 4 + length
        return numbers
