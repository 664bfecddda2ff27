"""Checking a checkpoint's files against the manifest that was written with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanotron_fast.checkpoints.io_modes import mode_for
from nanotron_fast.checkpoints.manifest import rest_sha256
from nanotron_fast.checkpoints.partial import between
from nanotron_fast.checkpoints.remote.urls import as_path, is_url, without_password
from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.manifest import (
    NAME,
    ManifestFile,
    ManifestTensor,
    read_manifest,
)
from nanotron_fast.formats.plain_file import check_plain
from nanotron_fast.formats.safetensors import TensorInfo, read_header
from nanotron_fast.moves import engine
from nanotron_fast.moves.engine import ProgressCallback


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as the manifest says: in which file, of which tensor, and what.

    `tensor` is None where it is the file's. The digests are in hexadecimal.
    """

    file: str
    tensor: str | None
    reason: str
    wanted_sha256: str | None = None
    found_sha256: str | None = None

    def __str__(self) -> str:
        where = self.file if self.tensor is None else f"{self.tensor} in {self.file}"
        return f"{where}: {self.reason}"


@dataclass(frozen=True, slots=True)
class ManifestCheck:
    """What a check found. `bytes_checked` are those of tensors, which were hashed."""

    path: Path
    findings: tuple[Finding, ...]
    files_checked: int
    tensors_checked: int
    bytes_checked: int

    @property
    def intact(self) -> bool:
        """Whether all is as the manifest says."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """The contract of `verify DST --json`."""
        findings = [
            {
                "file": each.file,
                "tensor": each.tensor,
                "reason": each.reason,
                "wanted_sha256": each.wanted_sha256,
                "found_sha256": each.found_sha256,
            }
            for each in self.findings
        ]
        return {
            "intact": self.intact,
            "files_checked": self.files_checked,
            "tensors_checked": self.tensors_checked,
            "bytes_checked": self.bytes_checked,
            "findings": findings,
        }


def check_manifest(
    path: str | Path,
    *,
    workers: int | None = None,
    on_plan: Callable[[int], None] | None = None,
    on_progress: ProgressCallback | None = None,
) -> ManifestCheck:
    """Hashes every tensor of a checkpoint, and compares with the manifest that lies beside them.

    Args:
        path: a directory that `convert` has written with `manifest=True`, or its file:// URL.
        workers: threads; by default one for each core, 16 at most.
        on_plan: called with the number of bytes to hash.
        on_progress: called now and then with the bytes hashed so far.

    Raises:
        CheckpointError: there is no manifest, or it cannot be read. OSError.
    """
    path = as_path(path, "the checkpoint")
    if is_url(path):
        raise CheckpointError(
            f"{without_password(str(path))}: files are checked against their manifest on a disk "
            "alone: copy the checkpoint to one"
        )
    root = Path(path)
    aside = between(root)
    if not root.is_dir():
        raise CheckpointError(f"{path}: no such directory{f': {aside}' if aside else ''}")
    if aside is not None:
        raise CheckpointError(f"{path}: {aside}")
    manifest = read_manifest(root)
    findings: list[Finding] = []
    wanted: list[_Wanted] = []
    for name, file in manifest.files.items():
        findings += _check_file(root, name, file, wanted)
    findings += _unknown_files(root, manifest.files)
    num_bytes = sum(each.tensor.end_bytes - each.tensor.begin_bytes for each in wanted)
    if on_plan is not None:
        on_plan(num_bytes)
    findings += _rotten(root, wanted, num_bytes, workers, on_progress)
    order = {name: place for place, name in enumerate(manifest.files)}
    findings.sort(key=lambda each: order.get(each.file, len(order)))
    return ManifestCheck(root, tuple(findings), len(manifest.files), len(wanted), num_bytes)


@dataclass(slots=True)
class _Wanted:
    """A tensor to be hashed, at the place where it lies now."""

    file: str
    name: str
    tensor: ManifestTensor


def _check_file(
    root: Path, name: str, file: ManifestFile, wanted: list[_Wanted]
) -> Iterator[Finding]:
    """What is wrong with a file, but for the values of its tensors; those are added to `wanted`."""
    path = root / name
    try:
        check_plain(path)
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        yield Finding(name, None, "it is missing")
        return
    except CheckpointError as error:
        yield Finding(name, None, str(error))
        return
    if size != file.size_bytes:
        yield Finding(name, None, f"it has {size:,} bytes, and had {file.size_bytes:,}")
    if name.endswith(".safetensors"):
        yield from _check_header(path, name, file, wanted)
        return
    if size != file.size_bytes:
        return  # nothing says where anything is now
    if _rest_sha256(path, size, file.tensors.values()) != file.header_sha256:
        yield Finding(name, None, "the bytes around its tensors have changed")
    wanted += [_Wanted(name, key, tensor) for key, tensor in file.tensors.items()]


def _check_header(
    path: Path, name: str, file: ManifestFile, wanted: list[_Wanted]
) -> Iterator[Finding]:
    try:
        tensors = read_header(path).tensors
    except CheckpointError as error:
        yield Finding(name, None, str(error))
        return
    differs = False
    for key, tensor in file.tensors.items():
        info = tensors.get(key)
        if info is None:
            yield Finding(name, key, "the tensor is missing")
        elif (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
            kind = f"{info.dtype} {list(info.shape)}"
            yield Finding(name, key, f"it is {kind}, and was {tensor.kind}")
        else:
            wanted.append(_Wanted(name, key, _at(tensor, info)))
            continue
        differs = True
    for key in tensors:
        if key not in file.tensors:
            yield Finding(name, key, "the manifest does not know this tensor")
            differs = True
    # Said only where no tensor's entry says more.
    if not differs and path.stat().st_size == file.size_bytes:
        places = [each.tensor for each in wanted if each.file == name]
        if _rest_sha256(path, file.size_bytes, places) != file.header_sha256:
            yield Finding(name, None, "its header has changed")


def _at(tensor: ManifestTensor, info: TensorInfo) -> ManifestTensor:
    return replace(tensor, begin_bytes=info.begin_bytes, end_bytes=info.end_bytes)


def _rest_sha256(path: Path, size: int, tensors: Iterable[ManifestTensor]) -> str:
    return rest_sha256(path, size, [(each.begin_bytes, each.end_bytes) for each in tensors])


def _unknown_files(root: Path, known: Any) -> Iterator[Finding]:
    """Files of weights that the manifest does not name, in the folders that it has files in."""
    suffixes = {os.path.splitext(name)[1] for name in known}
    tops = {name.partition("/")[0] for name in known if "/" in name}
    places = [(root, [each for each in os.listdir(root) if (root / each).is_file()])]
    for top in sorted(tops):
        places += [(Path(place), files) for place, _, files in os.walk(root / top)]
    for place, files in places:
        for each in sorted(files):
            name = (place / each).relative_to(root).as_posix()
            if os.path.splitext(each)[1] in suffixes and name not in known:
                yield Finding(name, None, f"{NAME} does not know this file")


def _rotten(
    root: Path,
    wanted: list[_Wanted],
    num_bytes: int,
    workers: int | None,
    on_progress: ProgressCallback | None,
) -> Iterator[Finding]:
    files = list(dict.fromkeys(each.file for each in wanted))
    places = {name: place for place, name in enumerate(files)}
    ranges = [
        (
            places[each.file],
            each.tensor.begin_bytes,
            each.tensor.end_bytes - each.tensor.begin_bytes,
        )
        for each in wanted
    ]
    digests = engine.digest(
        [root / name for name in files],
        ranges,
        workers=engine.default_workers() if workers is None else workers,
        io=mode_for("auto", root, num_bytes),
        on_progress=on_progress,
    )
    for each, digest in zip(wanted, digests, strict=True):
        if digest.hex() != each.tensor.sha256:
            begin, end = each.tensor.begin_bytes, each.tensor.end_bytes
            yield Finding(
                each.file,
                each.name,
                f"its {end - begin:,} bytes have the SHA-256 {digest.hex()}, and had "
                f"{each.tensor.sha256}",
                each.tensor.sha256,
                digest.hex(),
            )
