"""The Hugging Face layout: `config.json`, and tensors in one safetensors file or several."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.chunks import Chunk
from nanotron_fast.formats.huggingface.files import (
    EXPLICIT,
    HEAD,
    INDEX,
    SINGLE,
    Files,
    choose_files,
)
from nanotron_fast.formats.huggingface.quantization import Quantization
from nanotron_fast.formats.json_file import read_json_object
from nanotron_fast.formats.new_files import NamedTensor, NewFile, bytes_of, grouped
from nanotron_fast.formats.patterns import matching
from nanotron_fast.formats.safetensors import TensorInfo, build_header, read_header
from nanotron_fast.moves.boxes import row_major
from nanotron_fast.moves.files import ReadFile

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
__all__ = ["INDEX", "SINGLE"]

_ADAPTER_CONFIG = "adapter_config.json"
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and the file that holds it.

    `chunks`: where the tensor does not lie whole in the file, and the file says alone where it
    does. Offsets of `info` mean nothing then.
    """

    path: Path
    info: TensorInfo
    chunks: tuple[Chunk, ...] = ()

    @property
    def pieces(self) -> tuple[Chunk, ...]:
        """The chunks of the tensor, one where it lies whole."""
        shape = self.info.shape
        whole = Chunk(self.path, self.info.begin_bytes, (0,) * len(shape), shape, row_major(shape))
        return self.chunks or (whole,)


@dataclass(frozen=True, slots=True)
class HfCheckpoint:
    """What is in a directory, from its headers.

    `format` is "hf"; or "dcp" where torch.distributed.checkpoint wrote the tensors, under whatever
    names: they have Hugging Face's here.
    """

    root: Path
    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    tensors: dict[str, StoredTensor]
    # The same tensors in other files of the folder, which must hold the same bytes.
    rivals: dict[str, StoredTensor] = field(default_factory=dict)
    # The head, where the index places one that no file holds: a tied model does without.
    absent: str | None = None
    warnings: tuple[str, ...] = ()
    # Tensors that were there, and that `without` took out.
    ignored: tuple[str, ...] = ()
    # What each file was when its header was read.
    read: Mapping[Path, ReadFile] = field(default_factory=dict)
    format: str = "hf"
    # Rotary pairs lie beside each other in q and k, as torchtitan has them.
    rope_interleaved: bool = False
    # The folder that the configuration is from, where it is another.
    configured_by: Path | None = None
    # Why there is no configuration, where there is none.
    lacks_config: str | None = None
    # Names of further files in the folder that belong to the tensors.
    other_files: frozenset[str] = frozenset()
    # How some of the tensors are quantised, where the configuration says so.
    quantization: Quantization | None = None

    @property
    def dtypes(self) -> set[str]:
        """Those of the tensors, by their safetensors names."""
        return {tensor.info.dtype for tensor in self.tensors.values()}

    @property
    def files(self) -> set[str]:
        """Names of the files that were read, in their folder."""
        tensors = (*self.tensors.values(), *self.rivals.values())
        names = {tensor.path.name for tensor in tensors}
        return {CONFIG, GENERATION_CONFIG, SINGLE, INDEX, *names, *self.other_files}

    def without(self, patterns: Sequence[str]) -> HfCheckpoint:
        """The checkpoint without the tensors whose names match."""
        ignored = matching(self.tensors, patterns)
        kept = {name: tensor for name, tensor in self.tensors.items() if name not in ignored}
        rivals = {name: self.rivals[name] for name in self.rivals if name in kept}
        return replace(self, tensors=kept, rivals=rivals, ignored=ignored)


def is_hf_checkpoint(root: Path) -> bool:
    """Whether a directory looks like one."""
    return (root / CONFIG).is_file()


def read_hf(root: Path) -> HfCheckpoint:
    """Reads config, index and headers. Raises CheckpointError, OSError."""
    if not (root / CONFIG).is_file():
        raise CheckpointError(f"{root}: no {CONFIG}: not a Hugging Face checkpoint")
    config = read_json_object(root / CONFIG)
    generation = root / GENERATION_CONFIG
    choice = choose_files(root, config)
    # It names a file of this folder, and would mislead in another.
    config.pop(EXPLICIT, None)
    read: dict[Path, ReadFile] = {}
    tensors, absent = _read_files(root, choice.files, choice.index, read)
    rivals: dict[str, StoredTensor] = {}
    if choice.rival is not None:
        rivals, _ = _read_files(root, choice.rival, choice.index, read)
        _check_rivals(root, tensors, rivals)
    warnings = list(choice.warnings)
    if (root / _ADAPTER_CONFIG).is_file():
        warnings.append(
            f"{root / _ADAPTER_CONFIG} lies beside the weights: where peft is installed, "
            "transformers loads the adapter's base model and not these weights. They are converted "
            "as they are"
        )
    return HfCheckpoint(
        root,
        config,
        read_json_object(generation) if generation.is_file() else None,
        tensors,
        rivals,
        absent or choice.absent,
        tuple(warnings),
        read=read,
    )


def _read_files(
    root: Path, files: Files, index: str, read: dict[Path, ReadFile]
) -> tuple[dict[str, StoredTensor], str | None]:
    """The tensors of these files, and the head if it is placed in one that does not hold it.

    What the files are is noted in `read`.
    """
    tensors: dict[str, StoredTensor] = {}
    absent: str | None = None
    for name, wanted in files.items():
        # One Path for all tensors of a file: there may be tens of thousands.
        path = root / name
        header = read_header(path)
        read[path] = header.read
        for tensor, info in header.tensors.items():
            if wanted is not None and tensor not in wanted:
                raise CheckpointError(
                    f"{path}: it holds {tensor}, which {index} does not place there"
                )
            tensors[tensor] = StoredTensor(path, info)
        for tensor in wanted or ():
            if tensor in header.tensors:
                continue
            if tensor != HEAD:
                raise CheckpointError(f"{path}: {index} places {tensor} there; it is not")
            absent = tensor
    return tensors, absent


def _check_rivals(
    root: Path, tensors: Mapping[str, StoredTensor], rivals: Mapping[str, StoredTensor]
) -> None:
    """Refuses two sets of weights whose headers differ already. Raises CheckpointError."""
    for name in (*tensors, *rivals):
        first, second = tensors.get(name), rivals.get(name)
        if first is None or second is None:
            raise two_sets(root, f"{name} is in {INDEX if first is None else SINGLE} alone")
        for a, b in ((first.info.dtype, second.info.dtype), (first.info.shape, second.info.shape)):
            if a != b:
                raise two_sets(root, f"{name} is {a} in {SINGLE} and {b} in {second.path.name}")


def check_rival_bytes(checkpoint: HfCheckpoint) -> None:
    """Compares what lies in two files of a folder, byte for byte, a block at a time.

    Raises CheckpointError where they differ, OSError.
    """
    with ExitStack() as stack:
        paths = {tensor.path for tensor in (*checkpoint.rivals.values(),)}
        paths |= {checkpoint.tensors[name].path for name in checkpoint.rivals}
        files = {path: stack.enter_context(open(path, "rb", buffering=0)) for path in paths}
        for name, other in checkpoint.rivals.items():
            tensor = checkpoint.tensors[name]
            first, second = files[tensor.path].fileno(), files[other.path].fileno()
            num_bytes = tensor.info.end_bytes - tensor.info.begin_bytes
            for start in range(0, num_bytes, _BLOCK_BYTES):
                count = min(_BLOCK_BYTES, num_bytes - start)
                a = os.pread(first, count, tensor.info.begin_bytes + start)
                b = os.pread(second, count, other.info.begin_bytes + start)
                if a != b:
                    raise two_sets(
                        checkpoint.root, f"{name} differs between {SINGLE} and {other.path.name}"
                    )


def two_sets(root: Path, difference: str) -> CheckpointError:
    """The error for a folder with two models in it."""
    return CheckpointError(
        f"{root}: the weights are there twice, in {SINGLE} and in the shards of {INDEX}, and are "
        f"not the same: {difference}. transformers loads {SINGLE}; move away the one that is not "
        "meant"
    )


def layout_shards(
    tensors: Sequence[NamedTensor], max_shard_bytes: int
) -> tuple[list[NewFile], bytes | None]:
    """Files for these tensors, in this order, `grouped` by their size, and the index.

    The index is None where one file is enough.
    """
    shards = grouped(tensors, max_shard_bytes)
    count = len(shards)
    files: list[NewFile] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        # Wider elements first keep every tensor aligned to its element.
        shard.sort(key=lambda tensor: -tensor[1].itemsize)
        header, offsets = build_header(shard, {"format": "pt"})
        size = len(header) + sum(map(bytes_of, shard))
        files.append(NewFile(name, size, offsets, header))
        weight_map.update((tensor, name) for tensor, _, _ in shard)
    if count == 1:
        return files, None
    total = sum(map(bytes_of, tensors))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return files, (json.dumps(index, indent=2) + "\n").encode()
