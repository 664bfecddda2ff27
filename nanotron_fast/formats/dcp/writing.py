"""Laying out a folder that torch.distributed.checkpoint loads, without torch.

Each tensor is one chunk: a file of torch.save's within a `.distcp` file. As in files that torch
saves with `torch.serialization.set_crc32_options(False)`, the checksums of their records are not
those of the tensors, which are not there yet; torch.load does not ask for them.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nanotron_fast.formats.dcp.metadata import CLASSES, STORAGE_INFO
from nanotron_fast.formats.new_files import NamedTensor, NewFile, bytes_of, grouped
from nanotron_fast.formats.torch_file.writing import NewTensor, lay_out
from nanotron_fast.moves.dtypes import Dtype

_ALIGNMENT_BYTES = 64
# Writes that begin inside a page make the page cache work twice on it.
_PAGE_BYTES = 4096
_VERSION = "1.0.0"


@dataclass(frozen=True, slots=True)
class _Item:
    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    file: str
    offset_bytes: int
    size_bytes: int


def layout_dcp(tensors: Sequence[NamedTensor], max_file_bytes: int) -> tuple[list[NewFile], bytes]:
    """Files for these tensors, in this order, `grouped` by their size, and `.metadata`."""
    files: list[NewFile] = []
    items: list[_Item] = []
    for rank, group in enumerate(grouped(tensors, max_file_bytes)):
        # As if each file had been written by a rank of its own.
        file, inside = _layout_file(f"__{rank}_0.distcp", group)
        files.append(file)
        items += inside
    return files, _metadata(items)


def _layout_file(name: str, tensors: Sequence[NamedTensor]) -> tuple[NewFile, list[_Item]]:
    """The file: its bytes but for the tensors, and where those start."""
    literals: list[tuple[int, bytes]] = []
    offsets: dict[str, int] = {}
    items: list[_Item] = []
    end = 0
    for tensor, dtype, shape in tensors:
        layout = lay_out(NewTensor(tensor, dtype, shape))
        inside = layout.offsets[tensor]
        is_large = bytes_of((tensor, dtype, shape)) >= _PAGE_BYTES
        alignment = _PAGE_BYTES if is_large else _ALIGNMENT_BYTES
        start = end + -(end + inside) % alignment
        if start > end:
            literals.append((end, bytes(start - end)))
        literals += [(start + at, data) for at, data in layout.literals if data]
        offsets[tensor] = start + inside
        items.append(_Item(tensor, dtype, shape, name, start, layout.size_bytes))
        end = start + layout.size_bytes
    return NewFile(name, end, offsets, literals=tuple(literals)), items


def _metadata(items: Sequence[_Item]) -> bytes:
    """The pickle of DCP's Metadata, as torch's own writer makes it."""
    state = _dictionary((_text(item.name), _tensor(item)) for item in items)
    planner = _dictionary((_text(item.name), _tuple([_text(item.name)])) for item in items)
    storage = _dictionary((_index(item), _info(item)) for item in items)
    storage_meta = _object(
        f"{CLASSES}.StorageMeta",
        [
            *(("checkpoint_id", _NONE), ("save_id", _NONE), ("load_id", _NONE)),
            ("modules", _list([])),
        ],
    )
    document = _object(
        f"{CLASSES}.Metadata",
        [
            ("state_dict_metadata", state),
            ("planner_data", planner),
            ("storage_data", storage),
            ("storage_meta", storage_meta),
            ("version", _text(_VERSION)),
        ],
    )
    return b"\x80\x02" + document + b"."


def _tensor(item: _Item) -> bytes:
    layout = _call("torch.serialization._get_layout", [_text("torch.strided")])
    memory_format = _call(f"{CLASSES}._MEM_FORMAT_ENCODING", [_integer(0)])
    dtype = _global(f"torch.{item.dtype.torch_name}")
    properties = (
        _global(f"{CLASSES}.TensorProperties")
        + b")\x81"
        + _tuple([dtype, layout, _FALSE, memory_format, _FALSE])
        + b"b"
    )
    zeros = (0,) * len(item.shape)
    chunk = _object(
        f"{CLASSES}.ChunkStorageMetadata", [("offsets", _size(zeros)), ("sizes", _size(item.shape))]
    )
    return _object(
        f"{CLASSES}.TensorStorageMetadata",
        [("properties", properties), ("size", _size(item.shape)), ("chunks", _list([chunk]))],
    )


def _index(item: _Item) -> bytes:
    zeros = (0,) * len(item.shape)
    fields = [("fqn", _text(item.name)), ("index", _integer(0)), ("offset", _size(zeros))]
    return _object(f"{CLASSES}.MetadataIndex", fields)


def _info(item: _Item) -> bytes:
    return _object(
        STORAGE_INFO,
        [
            ("relative_path", _text(item.file)),
            ("offset", _integer(item.offset_bytes)),
            ("length", _integer(item.size_bytes)),
        ],
    )


# Instructions of protocol 2, each of which leaves one value: see Python's pickletools.
_NONE, _FALSE = b"N", b"\x89"


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<L", len(raw)) + raw


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<l", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _tuple(values: Sequence[bytes]) -> bytes:
    return b"(" + b"".join(values) + b"t"


def _list(values: Sequence[bytes]) -> bytes:
    return b"](" + b"".join(values) + b"e"


def _dictionary(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"}(" + b"".join(itertools.chain.from_iterable(pairs)) + b"u"


def _global(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def _call(name: str, arguments: Sequence[bytes]) -> bytes:
    return _global(name) + _tuple(arguments) + b"R"


def _object(name: str, fields: Sequence[tuple[str, bytes]]) -> bytes:
    """One of a class that is made without arguments, and given its fields."""
    state = _dictionary((_text(field), value) for field, value in fields)
    return _global(name) + b")\x81" + state + b"b"


def _size(values: Sequence[int]) -> bytes:
    return _call("torch.Size", [_tuple([_integer(value) for value in values])])
