"""The Hugging Face layout: `config.json`, and tensors in one safetensors file or several."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanotron_fast.dtypes import Dtype
from nanotron_fast.errors import CheckpointError, ConfigError
from nanotron_fast.header import TensorInfo, build_header, read_header
from nanotron_fast.layouts.json_file import read_json_object

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_SHARD_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and the file that holds it."""

    path: Path
    info: TensorInfo


@dataclass(frozen=True, slots=True)
class HfCheckpoint:
    """What is in a directory, from its headers."""

    root: Path
    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    tensors: dict[str, StoredTensor]


def is_hf_checkpoint(root: Path) -> bool:
    """Whether a directory looks like one."""
    return (root / CONFIG).is_file()


def read_hf(root: Path) -> HfCheckpoint:
    """Reads config, index and headers. Raises CheckpointError, OSError."""
    if not (root / CONFIG).is_file():
        raise CheckpointError(f"{root}: no {CONFIG}: not a Hugging Face checkpoint")
    config = read_json_object(root / CONFIG)
    generation = root / GENERATION_CONFIG
    tensors: dict[str, StoredTensor] = {}
    for name, wanted in _tensor_files(root).items():
        header = read_header(root / name)
        for tensor, info in header.tensors.items():
            if wanted is not None and tensor not in wanted:
                raise CheckpointError(
                    f"{root / name}: it holds {tensor}, which {INDEX} does not place there"
                )
            tensors[tensor] = StoredTensor(root / name, info)
        for tensor in wanted or ():
            if tensor not in header.tensors:
                raise CheckpointError(f"{root / name}: {INDEX} places {tensor} there; it is not")
    return HfCheckpoint(
        root, config, read_json_object(generation) if generation.is_file() else None, tensors
    )


def _tensor_files(root: Path) -> dict[str, set[str] | None]:
    """File names, each with the tensors that the index places in it (None without an index)."""
    if not (root / INDEX).is_file():
        if (root / SINGLE).is_file():
            return {SINGLE: None}
        legacy = sorted(path.name for path in root.glob("pytorch_model*.bin*"))
        if legacy:
            raise CheckpointError(
                f"{root}: the weights are in {legacy[0]}, a pickle that can run code when it is "
                'read. Save them as safetensors first: python -c "from transformers import '
                f"AutoModelForCausalLM as M; M.from_pretrained('{root}', torch_dtype='auto')"
                ".save_pretrained('NEW_DIRECTORY')\""
            )
        raise CheckpointError(f"{root}: neither {SINGLE} nor {INDEX} is there")
    weight_map = read_json_object(root / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{root / INDEX}: no weight_map that maps tensors to files")
    files: dict[str, set[str] | None] = {}
    for tensor, name in weight_map.items():
        # A path here could lead out of the checkpoint.
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or name in ("", "..")
            or "\x00" in name
        ):
            raise CheckpointError(
                f"{root / INDEX}: {tensor} is placed in {name!r}, which is not a file name"
            )
        wanted = files.setdefault(name, set())
        assert wanted is not None
        wanted.add(tensor)
    for name in files:
        if not (root / name).is_file():
            raise CheckpointError(f"{root}: {name} is missing; {INDEX} places tensors in it")
    return files


def parse_shard_size(text: str | int) -> int:
    """Bytes, from a number or a decimal size such as "5GB". Raises ConfigError."""
    if isinstance(text, int):
        size = text
    else:
        number, unit = text.strip().upper(), 1
        for suffix, factor in _SHARD_UNITS.items():
            if number.endswith(suffix):
                number, unit = number[: -len(suffix)].strip(), factor
                break
        try:
            size = int(float(number) * unit)
        except (ValueError, OverflowError):
            raise ConfigError(f"--max-shard-size {text}: write it like 5GB or 500MB") from None
    if size < 1:
        raise ConfigError(f"--max-shard-size {text}: a shard has at least one byte")
    return size


@dataclass(frozen=True, slots=True)
class NewFile:
    """A safetensors file to be written: its header, its size, where its tensors start."""

    name: str
    header: bytes
    size_bytes: int
    offsets: dict[str, int]


def layout_shards(
    tensors: Sequence[tuple[str, Dtype, tuple[int, ...]]], max_shard_bytes: int
) -> tuple[list[NewFile], bytes | None]:
    """Files for these tensors, in this order, and the index (None where one file is enough).

    A shard is closed before the tensor that would take it over `max_shard_bytes`, so a larger
    tensor has one to itself.
    """
    shards: list[list[tuple[str, Dtype, tuple[int, ...]]]] = [[]]
    used = total = 0
    for tensor in tensors:
        num_bytes = math.prod(tensor[2]) * tensor[1].itemsize
        if shards[-1] and used + num_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += num_bytes
        total += num_bytes
    count = len(shards)
    files: list[NewFile] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        # Wider elements first keep every tensor aligned to its element.
        shard.sort(key=lambda tensor: -tensor[1].itemsize)
        header, offsets = build_header(shard, {"format": "pt"})
        size = len(header) + sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in shard)
        files.append(NewFile(name, header, size, offsets))
        weight_map.update((tensor, name) for tensor, _, _ in shard)
    if count == 1:
        return files, None
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return files, (json.dumps(index, indent=2) + "\n").encode()
