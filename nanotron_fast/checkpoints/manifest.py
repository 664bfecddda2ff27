"""Making a manifest: which bytes of a plan's files are hashed, and what becomes of the digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanotron_fast.checkpoints.journal import read_record
from nanotron_fast.checkpoints.partial import Partial
from nanotron_fast.checkpoints.small_files import write_file
from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.manifest import NAME, Manifest, ManifestFile, ManifestTensor
from nanotron_fast.formats.plain_file import open_plain
from nanotron_fast.formats.safetensors import header_of
from nanotron_fast.moves import engine
from nanotron_fast.moves.plan import OutputFile
from nanotron_fast.version import __version__

_SAFETENSORS = ".safetensors"
_TORCH = ".pt"
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Hashed:
    """A tensor of an output, or bytes of which no more is known."""

    name: str
    begin_bytes: int
    end_bytes: int
    dtype: str | None = None
    shape: tuple[int, ...] | None = None


def hashed_in(output: OutputFile) -> list[Hashed]:
    """What is hashed of an output, in the order of its bytes: tensors as its header names them.

    In a file of another format it is whatever lies between the bytes that the plan itself gives,
    such as a zip's headers.
    """
    if output.path.endswith(_SAFETENSORS):
        header = header_of(Path(output.path), output.header, output.size_bytes)
        tensors = [
            Hashed(name, info.begin_bytes, info.end_bytes, info.dtype, info.shape)
            for name, info in header.tensors.items()
        ]
        return sorted(tensors, key=lambda each: (each.begin_bytes, each.end_bytes))
    position = len(output.header)
    found = []
    for offset, literal in (*output.literals, (output.size_bytes, b"")):
        if offset > position:
            found.append(Hashed(f"bytes {position} to {offset}", position, offset))
        position = offset + len(literal)
    return found


def ranges_of(outputs: Iterable[OutputFile]) -> dict[str, list[tuple[int, int]]]:
    """For the engine: (offset, size) in bytes of what is hashed of each output, by its path."""
    return {
        output.path: [
            (each.begin_bytes, each.end_bytes - each.begin_bytes) for each in hashed_in(output)
        ]
        for output in outputs
    }


def make_manifest(
    root: Path, outputs: Sequence[OutputFile], digests: Mapping[str, Sequence[str]]
) -> Manifest:
    """The manifest of files that are whole, by their paths from `root`.

    `digests` are those of what `hashed_in` says, in hexadecimal. Raises OSError.
    """
    files = {}
    for output in outputs:
        hashed = hashed_in(output)
        if output.checksums:  # they stand in the file alone
            ranges = [(each.begin_bytes, each.end_bytes) for each in hashed]
            rest = rest_sha256(root / output.path, output.size_bytes, ranges)
        else:
            literals = (output.header, *(literal for _, literal in output.literals))
            rest = hashlib.sha256(b"".join(literals)).hexdigest()
        names = _names_in(root, output)
        tensors = {
            names.get(each.begin_bytes, each.name): ManifestTensor(
                each.begin_bytes, each.end_bytes, digest, each.dtype, each.shape
            )
            for each, digest in zip(hashed, digests[output.path], strict=True)
        }
        files[output.path] = ManifestFile(output.size_bytes, rest, tensors)
    return Manifest(__version__, files)


def _names_in(root: Path, output: OutputFile) -> dict[int, str]:
    """What torch.save's tensors are called in their document, by where they begin in the file."""
    if not output.path.endswith(_TORCH):
        return {}
    from nanotron_fast.formats.torch_file import StoredTensor, read_torch_file

    found: dict[int, str] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, StoredTensor):
            found.setdefault(value.offset_bytes, name)
        elif isinstance(value, dict):
            for key, each in value.items():
                walk(each, f"{name}.{key}" if name else str(key))
        elif isinstance(value, list | tuple):
            for place, each in enumerate(value):
                walk(each, f"{name}.{place}")

    walk(read_torch_file(root / output.path), "")
    return found


def rest_sha256(path: Path, size: int, ranges: Iterable[tuple[int, int]]) -> str:
    """Of the bytes of a file that lie in none of the ranges, each from its begin to its end.

    Raises CheckpointError, OSError.
    """
    rest = hashlib.sha256()
    position = 0
    with open_plain(path) as file:
        for begin, end in (*sorted(ranges), (size, size)):
            file.seek(position)
            while position < begin:
                block = file.read(min(_BLOCK_BYTES, begin - position))
                if not block:
                    raise CheckpointError(f"{path}: it has shrunk while it was read")
                rest.update(block)
                position += len(block)
            position = max(position, end)
    return rest.hexdigest()


def write_manifest(
    partial: Partial,
    outputs: Sequence[OutputFile],
    digests: Mapping[str, Sequence[str]],
    *,
    workers: int,
    io: str,
    fsync: bool,
) -> None:
    """Writes the manifest beside files that are whole.

    Args:
        partial: where the files are, and the journals of all who wrote them.
        outputs: all of them.
        digests: of those that this run has written. Those of runs before stand in the journals;
            what was finished without being hashed is hashed now.

    Raises:
        OSError.
    """
    entries = read_record(partial.folder).entries
    known = {path: each.sha256 for path, each in entries.items()} | dict(digests)
    unknown = [
        output for output in outputs if len(known.get(output.path, ())) != len(hashed_in(output))
    ]
    if unknown:
        known |= hash_again(partial.content.path, unknown, workers=workers, io=io)
    data = make_manifest(partial.content.path, outputs, known).to_bytes()
    write_file(Path(NAME), data, fsync=fsync, within=partial.content)


def hash_again(
    root: Path, outputs: Sequence[OutputFile], *, workers: int, io: str
) -> dict[str, list[str]]:
    """Digests of files that are whole, by their paths from `root`. Raises OSError."""
    ranges = [
        (place, each.begin_bytes, each.end_bytes - each.begin_bytes)
        for place, output in enumerate(outputs)
        for each in hashed_in(output)
    ]
    paths = [root / output.path for output in outputs]
    found: dict[str, list[str]] = {output.path: [] for output in outputs}
    for (place, _, _), digest in zip(
        ranges, engine.digest(paths, ranges, workers=workers, io=io), strict=True
    ):
        found[outputs[place].path].append(digest.hex())
    return found
