"""Reading `.metadata`: what a folder of torch.distributed.checkpoint holds, and where.

It is a pickle of `torch.distributed.checkpoint.metadata.Metadata`. Nothing of it is executed: the
names of DCP's own classes stand for records here, and any other name is an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.dcp import METADATA
from nanotron_fast.formats.plain_file import is_file_name, read_small
from nanotron_fast.formats.sizes import are_sizes, is_size
from nanotron_fast.formats.torch_file.pickled import unpickle
from nanotron_fast.formats.torch_file.reading import DTYPES

CLASSES = "torch.distributed.checkpoint.metadata"
_OLD_CLASSES = "torch.distributed._shard.sharded_tensor.metadata"
STORAGE_INFO = "torch.distributed.checkpoint.filesystem._StorageInfo"
# What a message repeats of a name.
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Place:
    """Where an item lies: a range of bytes of a file of the folder.

    `transforms` have been applied to the bytes, such as a compression.
    """

    file: str
    offset_bytes: int
    size_bytes: int
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A box of a tensor, from index `low` on, and the item that holds it."""

    low: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place

    @property
    def high(self) -> tuple[int, ...]:
        """The first index behind it, along each dimension."""
        return tuple(low + size for low, size in zip(self.low, self.sizes, strict=True))


@dataclass(frozen=True, slots=True)
class ChunkedTensor:
    """A tensor. `dtype` is the safetensors format's name, or torch's where it has none.

    Chunks without elements are left out.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True, slots=True)
class DcpMetadata:
    """The tensors by their names, the names of what is no tensor, and a digest of the file."""

    tensors: dict[str, ChunkedTensor]
    others: tuple[str, ...]
    digest: str


class _Record:
    """An object of one of DCP's classes: its fields, whose names are known and not their values."""

    __slots__ = ("fields",)

    def __init__(self, *arguments: Any) -> None:
        if arguments:
            raise ValueError("an object made with arguments")
        self.fields: Mapping[Any, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError(f"an object with a state of type {type(state).__name__}")
        self.fields = state


class _Metadata(_Record):
    __slots__ = ()


class _Tensor(_Record):
    __slots__ = ()


class _Bytes(_Record):
    __slots__ = ()


class _Chunk(_Record):
    __slots__ = ()


class _Index(_Record):
    __slots__ = ()


class _Info(_Record):
    __slots__ = ()


class _StorageMeta(_Record):
    __slots__ = ()


class _Properties(_Record):
    """(dtype, layout, requires_grad, memory format, pin_memory)"""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        self.fields = {"dtype": state[0], "layout": state[1]} if isinstance(state, tuple) else state


_OfRecord = TypeVar("_OfRecord", bound=_Record)


class _Size(tuple[int, ...]):
    """torch.Size"""

    __slots__ = ()


def _size(sizes: Any = ()) -> _Size:
    if not are_sizes(sizes):
        raise ValueError("torch.Size of what are not sizes")
    return _Size(sizes)


def _first_text(*arguments: Any) -> str:
    return next((each for each in arguments if isinstance(each, str)), "")


def _number(value: Any = 0) -> int:
    return value if is_size(value) else 0


_CALLABLES: Mapping[str, Callable[..., Any]] = {
    f"{CLASSES}.Metadata": _Metadata,
    f"{CLASSES}.TensorStorageMetadata": _Tensor,
    f"{CLASSES}.BytesStorageMetadata": _Bytes,
    f"{CLASSES}.ChunkStorageMetadata": _Chunk,
    f"{CLASSES}.TensorProperties": _Properties,
    f"{CLASSES}.MetadataIndex": _Index,
    f"{CLASSES}.StorageMeta": _StorageMeta,
    f"{CLASSES}._MEM_FORMAT_ENCODING": _number,
    # Before torch 2.3.
    f"{_OLD_CLASSES}.TensorProperties": _Properties,
    f"{_OLD_CLASSES}.MEM_FORMAT_ENCODING": _number,
    STORAGE_INFO: _Info,
    "torch.Size": _size,
    "torch.serialization._get_layout": _first_text,
    # Where it was saved, which nobody asks for.
    "pathlib.Path": lambda *parts: "",
    "pathlib.PosixPath": lambda *parts: "",
    "pathlib._local.PosixPath": lambda *parts: "",
}
# Types of elements that the safetensors format does not know: parts of a training's state.
_OTHER_DTYPES = (
    *("complex128", "complex32", "qint8", "quint8", "qint32", "quint4x2", "quint2x4"),
    *("float4_e2m1fn_x2", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
    *("int1", "int2", "int3", "int4", "int5", "int6", "int7"),
    *("uint1", "uint2", "uint3", "uint4", "uint5", "uint6", "uint7"),
)
_CONSTANTS: Mapping[str, Any] = {
    **{f"torch.{name}": name for name in _OTHER_DTYPES},
    **{f"torch.{name}": dtype for name, dtype in DTYPES.items()},
}


def read_metadata(root: Path) -> DcpMetadata:
    """Reads what a folder holds. Raises CheckpointError, which names the file; OSError."""
    path = root / METADATA
    data = read_small(path)
    document = unpickle(data, where=str(path), callables=_CALLABLES, constants=_CONSTANTS)
    return _Reader(path, document).read(hashlib.sha256(data).hexdigest())


class _Reader:
    def __init__(self, path: Path, document: Any) -> None:
        self._path = path
        fields = self._fields(document, _Metadata, "the document")
        self._items = self._dict(fields, "state_dict_metadata")
        self._storage = self._dict(fields, "storage_data")

    def read(self, digest: str) -> DcpMetadata:
        places = dict(self._places())
        tensors: dict[str, ChunkedTensor] = {}
        others: list[str] = []
        for name, item in self._items.items():
            if not isinstance(name, str) or not name.isprintable():
                raise self._error(f"{_told(name)} is not the name of a tensor")
            if isinstance(item, _Bytes):
                others.append(name)
                continue
            shown = _told(name)
            fields = self._fields(item, _Tensor, f"what it says of {shown}")
            tensors[name] = self._tensor(shown, name, fields, places)
        return DcpMetadata(tensors, tuple(others), digest)

    def _tensor(
        self,
        shown: str,
        name: str,
        fields: Mapping[Any, Any],
        places: Mapping[tuple[str, tuple[int, ...]], Place],
    ) -> ChunkedTensor:
        properties = self._fields(fields.get("properties"), _Properties, f"the kind of {shown}")
        dtype: Any = properties.get("dtype")
        shape: Any = fields.get("size")
        chunks: Any = fields.get("chunks")
        if properties.get("layout") != "torch.strided":
            raise self._error(f"{shown} is not a dense tensor")
        is_tensor = isinstance(dtype, str) and isinstance(shape, _Size) and isinstance(chunks, list)
        if not is_tensor:
            raise self._error(f"what it says of {shown} is not a dtype, a shape and chunks")
        found: list[StoredChunk] = []
        for chunk in chunks:
            box = self._fields(chunk, _Chunk, f"a chunk of {shown}")
            low, sizes = box.get("offsets"), box.get("sizes")
            if not (isinstance(low, _Size) and isinstance(sizes, _Size)) or not (
                len(low) == len(sizes) == len(shape)
            ):
                raise self._error(
                    f"a chunk of {shown} is not one of {len(shape)} dimensions as the tensor is"
                )
            if 0 in sizes:
                continue
            place = places.get((name, tuple(low)))
            if place is None:
                raise self._error(f"it does not say where the chunk of {shown} at {list(low)} lies")
            found.append(StoredChunk(tuple(low), tuple(sizes), place))
        return ChunkedTensor(dtype, tuple(shape), tuple(found))

    def _places(self) -> Iterator[tuple[tuple[str, tuple[int, ...]], Place]]:
        for key, value in self._storage.items():
            index = self._fields(key, _Index, "the name of an item")
            name, low = index.get("fqn"), index.get("offset")
            if not isinstance(name, str) or not (low is None or isinstance(low, _Size)):
                raise self._error("the name of an item is not a tensor's name and an offset")
            shown = _told(name)
            info = self._fields(value, _Info, f"the place of {shown}")
            file: Any = info.get("relative_path")
            offset: Any = info.get("offset")
            size: Any = info.get("length")
            if not is_file_name(file) or not file.isprintable():
                raise self._error(
                    f"it places {shown} in {_told(file)}, which is not the name of a file in "
                    "the folder"
                )
            if not is_size(offset) or not is_size(size):
                raise self._error(
                    f"it places {shown} at byte {_told(offset)} of {file}, with {_told(size)} bytes"
                )
            transforms = info.get("transform_descriptors") or ()
            if not isinstance(transforms, (list, tuple)):
                raise self._error(f"what was done to {shown} is not a list")
            place = Place(file, offset, size, tuple(map(_told, transforms)))
            yield (name, tuple(low or ())), place

    def _dict(self, fields: Mapping[Any, Any], name: str) -> dict[Any, Any]:
        value = fields.get(name)
        if not isinstance(value, dict):
            raise self._error(f"its {name} is not a dictionary")
        return value

    def _fields(self, value: Any, kind: type[_OfRecord], what: str) -> Mapping[Any, Any]:
        if not isinstance(value, kind) or not isinstance(value.fields, dict):
            raise self._error(f"{what} is {_told(value)}, not what DCP writes")
        return value.fields

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {problem}")


def _told(value: Any) -> str:
    """What a message says of a value, which may be anything, and of any size."""
    if isinstance(value, (str, int)):
        return repr(value)[:_SHOWN]
    return f"a {type(value).__name__.strip('_')}"
