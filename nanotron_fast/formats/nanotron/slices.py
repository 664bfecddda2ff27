"""The header metadata of a sharded Nanotron file: which part of the whole tensor it holds.

`unsharded_shape` is the whole tensor's shape as Python prints a tuple. `local_global_slices_pairs`
is a list of pairs, joined by ";". A pair is LOCAL#GLOBAL; each of the two has one slice for each
dimension, joined by "|"; and a slice is "start,stop,step", with None for what is left out. Source:
SlicesPair in nanotron/parallel/parameters.py at 2411b022.

Where several ranks have a copy of a key-value head, their files name the same part of the whole.
Nanotron writes nothing like it, and this package's own class alone has it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanotron_fast.errors import CheckpointError, UnmovableError
from nanotron_fast.model.spread import Heads, has_copies, spans_of

METADATA_KEYS = ("version", "unsharded_shape", "local_global_slices_pairs")
_NEWEST_VERSION = (1, 5)

# No dimension is longer: sizes are 64 bits wide.
_NUMBER = r"\d{1,19}"
_SHAPE = re.compile(rf"\((?:{_NUMBER}(?:, ?{_NUMBER})*,?)?\)")
_SLICE = rf"(?:{_NUMBER}|None)(?:,(?:{_NUMBER}|None)){{2}}"
_SIDE = rf"{_SLICE}(?:\|{_SLICE})*"
_PAIR = re.compile(rf"({_SIDE})#({_SIDE})")


@dataclass(frozen=True, slots=True)
class Region:
    """A box of elements that a shard and the whole tensor have in common.

    Its first element has the index `local` in the shard and the index `whole` in the whole tensor.
    """

    local: tuple[int, ...]
    whole: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SlicesPair:
    """A part of a shard, and the part of the whole tensor that it is: one slice a dimension."""

    local: tuple[slice, ...]
    whole: tuple[slice, ...]

    def __str__(self) -> str:
        """As it stands in a header: "None,None,None|0,8,None#None,None,None|8,16,None"."""
        return f"{_side(self.local)}#{_side(self.whole)}"

    def region(self, shard: str, shape: tuple[int, ...], whole_shape: tuple[int, ...]) -> Region:
        """The box that the slices cut out of a shard and of the whole tensor, of these shapes.

        `shard` is what messages call the shard. Raises CheckpointError where the slices do not fit
        the shapes or each other, UnmovableError where they have steps.
        """
        local = _ranges(shard, self.local, shape)
        whole = _ranges(shard, self.whole, whole_shape)
        sizes = tuple(map(len, local))
        reaches_out = any(
            each.stop is not None and each.stop > size
            for slices, sizes_of_side in ((self.local, shape), (self.whole, whole_shape))
            for each, size in zip(slices, sizes_of_side, strict=True)
        )
        if reaches_out or sizes != tuple(map(len, whole)):
            raise CheckpointError(
                f"{shard}: of shape {list(shape)}, and {self} of a tensor of {list(whole_shape)} "
                "is not"
            )
        return Region(
            local=tuple(each.start for each in local),
            whole=tuple(each.start for each in whole),
            sizes=sizes,
        )


def _ranges(shard: str, slices: Sequence[slice], shape: Sequence[int]) -> list[range]:
    if len(slices) != len(shape):
        raise CheckpointError(f"{shard}: {len(slices)} slices of {len(shape)} dimensions")
    if any(each.step not in (None, 1) for each in slices):
        raise UnmovableError(f"the slices of {shard} have steps")
    return [range(size)[each] for each, size in zip(slices, shape, strict=True)]


# --- Writing


def shard_pairs(
    shape: tuple[int, ...],
    *,
    split: int | None,
    chunks: Sequence[int] | None,
    tp: int,
    rank: int,
    heads: Sequence[Heads | None] = (),
    first_copies: bool = False,
) -> tuple[SlicesPair, ...]:
    """Which slices of a rank's shard are which of the whole tensor.

    Args:
        shape: the whole tensor's.
        split: the dimension that is split over `tp` ranks; None where every rank has it all.
        chunks: lengths along `split` that are split each on their own; None for one of them.
        heads: of each chunk its key-value heads, where ranks beyond them have copies.
        first_copies: of what several ranks have, the first of them has it alone.
    """
    if split is None:
        everything = (slice(None),) * len(shape)
        return (SlicesPair(everything, everything),)
    cuts: list[tuple[slice, slice]] = []
    if has_copies(heads, tp):
        spans = spans_of(chunks or (shape[split],), heads, size=tp, rank=rank)
        cuts += [
            (
                slice(span.local, span.local + span.length),
                slice(span.whole, span.whole + span.length),
            )
            for span in spans
            if not (first_copies and rank % span.copies)
        ]
    elif chunks is None:
        share = shape[split] // tp
        cuts.append((slice(None), slice(rank * share, (rank + 1) * share)))
    else:
        start = 0
        for size in chunks:
            share = size // tp
            local = slice(start // tp, start // tp + share)
            cuts.append((local, slice(start + rank * share, start + (rank + 1) * share)))
            start += size
    return tuple(
        SlicesPair(_cut(len(shape), split, local), _cut(len(shape), split, whole))
        for local, whole in cuts
    )


def _cut(num_dims: int, split: int, cut: slice) -> tuple[slice, ...]:
    return tuple(cut if dim == split else slice(None) for dim in range(num_dims))


def shard_metadata(
    shape: tuple[int, ...],
    *,
    split: int,
    chunks: Sequence[int] | None,
    tp: int,
    rank: int,
    version: str,
    heads: Sequence[Heads | None] = (),
) -> dict[str, str]:
    """What the header of a rank's file says of it. The arguments are those of `shard_pairs`."""
    pairs = shard_pairs(shape, split=split, chunks=chunks, tp=tp, rank=rank, heads=heads)
    return {
        "version": version,
        "unsharded_shape": str(shape),
        "local_global_slices_pairs": ";".join(map(str, pairs)),
    }


def _side(slices: Sequence[slice]) -> str:
    return "|".join(f"{each.start},{each.stop},{each.step}" for each in slices)


# --- Reading


@dataclass(frozen=True, slots=True)
class ShardMetadata:
    """What the header of a shard's file says of it."""

    version: str
    whole_shape: tuple[int, ...]
    pairs: tuple[SlicesPair, ...]


def parse_metadata(
    path: Path, metadata: Mapping[str, str], shape: tuple[int, ...]
) -> ShardMetadata:
    """Reads the metadata of a file whose tensor has this shape.

    Raises CheckpointError, naming the file, where the metadata is not what Nanotron writes or does
    not fit the shape; UnmovableError where slices have steps.
    """
    check_keys(path, metadata)
    text = _without_numpy(metadata["unsharded_shape"])
    if _SHAPE.fullmatch(text) is None:
        raise CheckpointError(
            f"{path}: unsharded_shape is {text[:80]!r}, and should be a shape such as '(128, 64)'"
        )
    whole_shape = tuple(map(int, _numbers(text)))
    pairs: list[SlicesPair] = []
    for words in metadata["local_global_slices_pairs"].split(";"):
        match = _PAIR.fullmatch(words)
        if match is None:
            raise CheckpointError(
                f"{path}: local_global_slices_pairs holds {words[:80]!r}, which is not a pair such "
                "as '0,8,None|None,None,None#8,16,None|None,None,None'"
            )
        pair = SlicesPair(_parse_side(match[1]), _parse_side(match[2]))
        pair.region(str(path), shape, whole_shape)
        pairs.append(pair)
    return ShardMetadata(metadata["version"], whole_shape, tuple(pairs))


def _parse_side(text: str) -> tuple[slice, ...]:
    return tuple(
        slice(*(None if word == "None" else int(word) for word in each.split(",")))
        for each in text.split("|")
    )


def check_keys(path: Path, metadata: Mapping[str, str]) -> None:
    """Raises CheckpointError where a shard's metadata lacks a key."""
    for key in METADATA_KEYS:
        if key not in metadata:
            raise CheckpointError(f"{path}: __metadata__ of a sharded tensor lacks {key!r}")


def check_metadata(path: Path, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Compares a file's metadata with what its place in the model calls for.

    The version may be any that Nanotron itself reads: up to 1.5. Raises CheckpointError.
    """
    check_keys(path, found)
    version = re.fullmatch(r"(\d{1,4})\.(\d{1,4})(\.\d+)*", found["version"])
    if version is None or (int(version[1]), int(version[2])) > _NEWEST_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint version {found['version']!r}; this release knows those up to "
            f"{'.'.join(map(str, _NEWEST_VERSION))}"
        )
    shape = _without_numpy(found["unsharded_shape"])
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


def _without_numpy(shape: str) -> str:
    """Nanotron under numpy 2 writes "(np.int64(128), 64)", which is "(128, 64)"."""
    return re.sub(r"np\.int\d+\((\d+)\)", r"\1", shape)


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)
