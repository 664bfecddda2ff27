"""The header metadata of a sharded Nanotron file: which slice of the whole tensor it holds.

`local_global_slices_pairs` is pairs joined by ";", a pair is LOCAL#GLOBAL, a side one slice a
dimension joined by "|", a slice "start,stop,step" with None for what is missing. Source:
SlicesPair in nanotron/parallel/parameters.py at 2411b022.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from nanotron_fast.errors import CheckpointError

Slice = tuple[int | None, int | None]

METADATA_KEYS = ("version", "unsharded_shape", "local_global_slices_pairs")
_ALL = "None,None,None"
_NEWEST_VERSION = (1, 5)


def shard_metadata(
    shape: tuple[int, ...],
    split: int,
    chunks: tuple[int, ...] | None,
    tp: int,
    rank: int,
    version: str,
) -> dict[str, str]:
    """What a rank's file says of itself. `shape` is the whole tensor's."""
    pairs: list[str] = []
    if chunks is None:
        share = shape[split] // tp
        pairs.append(
            f"{_side(len(shape), split, None)}#"
            f"{_side(len(shape), split, (rank * share, (rank + 1) * share))}"
        )
    else:
        start = 0
        for size in chunks:
            share = size // tp
            local = (start // tp, start // tp + share)
            whole = (start + rank * share, start + (rank + 1) * share)
            pairs.append(f"{_side(len(shape), split, local)}#{_side(len(shape), split, whole)}")
            start += size
    return {
        "version": version,
        "unsharded_shape": str(shape),
        "local_global_slices_pairs": ";".join(pairs),
    }


def _side(num_dims: int, split: int, bounds: tuple[int, int] | None) -> str:
    return "|".join(
        f"{bounds[0]},{bounds[1]},None" if dim == split and bounds is not None else _ALL
        for dim in range(num_dims)
    )


def check_metadata(path: Path, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Compares a file's metadata with what its place in the model calls for.

    The version may be any that Nanotron itself reads: up to 1.5.

    A tensor's shape may read "(np.int64(128), 64)": Nanotron under numpy 2 writes that.
    Raises CheckpointError.
    """
    for key in METADATA_KEYS:
        if key not in found:
            raise CheckpointError(f"{path}: __metadata__ of a sharded tensor lacks {key!r}")
    version = re.fullmatch(r"(\d{1,4})\.(\d{1,4})(\.\d+)*", found["version"])
    if version is None or (int(version[1]), int(version[2])) > _NEWEST_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint version {found['version']!r}; this release knows those up to "
            f"{'.'.join(map(str, _NEWEST_VERSION))}"
        )
    shape = re.sub(r"np\.int64\((\d+)\)", r"\1", found["unsharded_shape"])
    if _numbers(shape) != _numbers(expected["unsharded_shape"]):
        raise CheckpointError(
            f"{path}: it is a shard of a tensor of shape {shape}, model_config.json calls for "
            f"{expected['unsharded_shape']}"
        )
    if found["local_global_slices_pairs"] != expected["local_global_slices_pairs"]:
        raise CheckpointError(
            f"{path}: its slices are {found['local_global_slices_pairs']}, the model calls for "
            f"{expected['local_global_slices_pairs']}"
        )


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)


def read_slices(
    path: Path, metadata: Mapping[str, str]
) -> tuple[tuple[int, ...], list[tuple[tuple[slice, ...], tuple[slice, ...]]]]:
    """The whole tensor's shape, and which slices of a file are which of it.

    Raises CheckpointError where the metadata is not what Nanotron writes.
    """
    try:
        text = re.sub(r"np\.int64\((\d+)\)", r"\1", metadata["unsharded_shape"])
        pairs = [
            tuple(
                tuple(
                    slice(*(None if word == "None" else int(word) for word in dim.split(",")))
                    for dim in side.split("|")
                )
                for side in pair.split("#", 1)
            )
            for pair in metadata["local_global_slices_pairs"].split(";")
        ]
        return tuple(map(int, _numbers(text))), [(local, whole) for local, whole in pairs]
    except (KeyError, ValueError, TypeError):
        raise CheckpointError(
            f"{path}: its __metadata__ does not say which part of the tensor it holds"
        ) from None
