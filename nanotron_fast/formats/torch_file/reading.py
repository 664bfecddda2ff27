"""Reading what torch.save wrote, without torch: a document, and where its tensors' bytes lie."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.plain_file import check_plain, open_plain
from nanotron_fast.formats.sizes import MAX_DIMS, MAX_SIZE, are_sizes, is_size
from nanotron_fast.formats.torch_file.archive import Archive, CutOff
from nanotron_fast.formats.torch_file.pickled import unpickle
from nanotron_fast.moves.dtypes import SAFETENSORS_BITS
from nanotron_fast.moves.files import FileState, ReadFile

# The document of the largest optimizer there is takes some hundred kilobytes.
_MAX_PICKLE_BYTES = 16 << 20

# torch's names of element types, and those of the safetensors format.
DTYPES: Mapping[str, str] = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "bfloat16": "BF16",
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "complex64": "C64",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
}
_STORAGES: Mapping[str, str] = {
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "ComplexFloatStorage": "C64",
    "UntypedStorage": "U8",
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file: where its first element lies in it, in bytes from the file's start.

    `dtype` is the safetensors format's name, strides are in elements and not negative. All of its
    elements lie within the file.
    """

    path: Path
    offset_bytes: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one behind the other in C order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return self.num_elements == 0
            expected *= size
        return True

    def read(self) -> bytes:
        """The bytes of a tensor that is small and contiguous. Raises CheckpointError, OSError."""
        size = self.num_elements * SAFETENSORS_BITS[self.dtype] // 8
        with open_plain(self.path) as file:
            data = os.pread(file.fileno(), size, self.offset_bytes)
        if len(data) < size:
            raise CheckpointError(f"{self.path}: the file shrank while it was read")
        return data


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: str


@dataclass(frozen=True, slots=True)
class _Storage:
    offset_bytes: int
    size_bytes: int
    dtype: str


def read_torch_file(
    path: Path,
    *,
    offset_bytes: int = 0,
    size_bytes: int | None = None,
    read: dict[Path, ReadFile] | None = None,
) -> Any:
    """The document of a file that torch.save wrote; its tensors are StoredTensor.

    Reads the document and the headers of records, and no tensor. Nothing of it is executed.

    Args:
        offset_bytes, size_bytes: the range of the file that was written so; by default all of it.
        read: notes what the file was when its document was read.

    Raises CheckpointError, which names the file and what is wrong with it; OSError.
    """
    check_plain(path)
    with open_plain(path) as file:
        try:
            archive = Archive(file, path, offset_bytes=offset_bytes, size_bytes=size_bytes)
        except CutOff as error:
            beginning = error.archive
            needed = _bytes_needed(beginning)
            if needed is None or needed <= beginning.size_bytes:
                raise
            raise beginning.error(
                f"it was cut off: it has {beginning.size_bytes:,} bytes, and its tensors alone "
                f"take {needed:,}"
            ) from None
        root = archive.root
        if f"{root}/byteorder" in archive.names:
            order = archive.read(f"{root}/byteorder", at_most=64)
            if order != b"little":
                raise archive.error(
                    f"its numbers are in the byte order {order.decode('ascii', 'replace')!r}"
                )
        data = archive.read(f"{root}/data.pkl", at_most=_MAX_PICKLE_BYTES)
        if read is not None:
            state = FileState.of(os.fstat(file.fileno()))
            read[path] = ReadFile(state, hashlib.sha256(data).hexdigest())
        storages = _Storages(archive, root)
        return _document(archive, data, storages.named)


_CONSTANTS: Mapping[str, Any] = {
    **{f"torch.{name}": dtype for name, dtype in DTYPES.items()},
    **{f"torch.{name}": _StorageType(dtype) for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": _StorageType("U8"),
}


def _document(archive: Archive, data: bytes, named: Callable[[Any], _Storage]) -> Any:
    return unpickle(
        data,
        where=archive.where,
        callables=_callables(archive),
        constants=_CONSTANTS,
        persistent=named,
    )


def _bytes_needed(archive: Archive) -> int | None:
    """Bytes of the tensors of a file that was cut off: its document is the first record.

    None where that is lost too. Raises OSError.
    """
    data = archive.first(at_most=_MAX_PICKLE_BYTES)
    if data is None:
        return None
    sizes: dict[str, int] = {}

    def named(key: Any) -> _Storage:
        name, dtype, count = _storage_of(archive, key)
        sizes[name] = count * SAFETENSORS_BITS[dtype] // 8
        return _Storage(0, sizes[name], dtype)

    try:
        _document(archive, data, named)
    except CheckpointError:  # then it is no document of torch's, and the file is cut off anyway
        return None
    return sum(sizes.values())


def _storage_of(archive: Archive, key: Any) -> tuple[str, str, int]:
    """What a persistent id says, ("storage", type, name, device, length): name, dtype, length."""
    if not (isinstance(key, tuple) and len(key) == 5 and key[0] == "storage"):
        raise archive.error("it refers to something that is not a storage of a tensor")
    _, kind, name, _, count = key
    if not (isinstance(kind, _StorageType) and isinstance(name, str) and is_size(count)):
        raise archive.error("it describes a storage of a tensor in an unknown way")
    return name, kind.dtype, count


class _Storages:
    """The records that hold tensors' elements."""

    def __init__(self, archive: Archive, root: str) -> None:
        self._archive, self._root = archive, root
        self._found: dict[tuple[str, str], _Storage] = {}

    def named(self, key: Any) -> _Storage:
        """The storage that a persistent id names."""
        error = self._archive.error
        name, dtype, count = _storage_of(self._archive, key)
        if (name, dtype) not in self._found:
            record = f"{self._root}/data/{name}"
            size = self._archive.size_of(record)
            if count * SAFETENSORS_BITS[dtype] != size * 8:
                raise error(
                    f"the record {record!r} has {size} bytes, and {count} elements of {dtype} take "
                    f"{count * SAFETENSORS_BITS[dtype] // 8}"
                )
            self._found[name, dtype] = _Storage(self._archive.offset_of(record), size, dtype)
        return self._found[name, dtype]


def _callables(archive: Archive) -> dict[str, Callable[..., Any]]:
    def tensor(
        storage: Any, offset: Any, shape: Any, strides: Any, *_: Any, dtype: Any = None
    ) -> StoredTensor:
        if not isinstance(storage, _Storage):
            raise archive.error("it makes a tensor of what is not a storage")
        dtype = storage.dtype if dtype is None else dtype
        if not (isinstance(dtype, str) and dtype in SAFETENSORS_BITS):
            raise archive.error("it makes a tensor of an unknown type of elements")
        is_sized = are_sizes(shape) and are_sizes(strides) and is_size(offset)
        if not is_sized or len(shape) != len(strides):
            raise archive.error(
                f"a tensor has the shape {_told(shape)}, the strides {_told(strides)} and the "
                f"offset {_told(offset)}"
            )
        item = SAFETENSORS_BITS[dtype] // 8
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        needed = (offset + last + 1) * item if math.prod(shape) else 0
        if needed > storage.size_bytes:
            raise archive.error(
                f"a tensor of the shape {_told(shape)} ends at byte {needed} of a storage of "
                f"{storage.size_bytes}"
            )
        if math.prod(shape) > MAX_SIZE:
            raise archive.error(f"a tensor of the shape {_told(shape)} is larger than can be")
        start = storage.offset_bytes + offset * item
        return StoredTensor(archive.path, start, dtype, tuple(shape), tuple(strides))

    def tensor_of_dtype(
        storage: Any,
        offset: Any,
        shape: Any,
        strides: Any,
        _grad: Any,
        _hooks: Any,
        dtype: Any,
        *_: Any,
    ) -> StoredTensor:
        return tensor(storage, offset, shape, strides, dtype=dtype)

    def parameter(data: Any, *_: Any) -> StoredTensor:
        if not isinstance(data, StoredTensor):
            raise archive.error("it makes a parameter of what is not a tensor")
        return data

    def encoded(text: Any, encoding: Any) -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise archive.error("it encodes text in an unusual way")
        return text.encode("latin1")

    return {
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_tensor_v3": tensor_of_dtype,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_parameter_with_state": parameter,
        "torch.Size": _flat_tuple,
        "torch.device": _device,
        "collections.OrderedDict": _empty_dict,
        "builtins.set": _flat_set,
        "builtins.frozenset": lambda *parts: frozenset(_flat_set(*parts)),
        "_codecs.encode": encoded,
    }


def _device(*parts: Any) -> str:
    # The text of anything else may be too long to be made: parts that lie in it many times over.
    if not all(isinstance(part, (str, int)) for part in parts):
        raise ValueError("torch.device of other things than text and numbers")
    return ":".join(str(part)[:80] for part in parts)


def _flat_tuple(sizes: Any = ()) -> tuple[int, ...]:
    if not are_sizes(sizes):
        raise ValueError(f"torch.Size of {_told(sizes)}")
    return tuple(sizes)


def _empty_dict(*parts: Any) -> dict[Any, Any]:
    if any(parts):
        raise ValueError("a dictionary made of its items")
    return {}


def _flat_set(items: Any = ()) -> set[Any]:
    if not isinstance(items, list) or not all(isinstance(each, (str, int)) for each in items):
        raise ValueError("a set of other things than text and integers")
    return set(items)


def _told(value: Any) -> str:
    """What a message says of a value, which may be anything."""
    if isinstance(value, (tuple, list)) and len(value) <= MAX_DIMS:
        if all(isinstance(each, int) for each in value):
            return str(list(value))[:200]
        return f"a {type(value).__name__} of other things than sizes"
    return str(value)[:200] if isinstance(value, int) else f"a {type(value).__name__}"
