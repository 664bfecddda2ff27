"""What a shard's header says of it: written, and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotron_fast.errors import CheckpointError, UnmovableError
from nanotron_fast.formats.nanotron.slices import (
    Region,
    SlicesPair,
    parse_metadata,
    shard_metadata,
    shard_pairs,
)

PATH = Path("model_weight_tp-rank-1.safetensors")
ALL = slice(None)
METADATA = {
    "version": "1.5",
    "unsharded_shape": "(8, 6)",
    "local_global_slices_pairs": "None,None,None|None,None,None#4,8,None|None,None,None",
}


@settings(deadline=None)
@given(st.data())
def test_what_is_written_is_read_again(data: st.DataObject) -> None:
    draw = data.draw
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    split = draw(st.integers(0, len(shape) - 1))
    tp = draw(st.integers(1, 4))
    rank = draw(st.integers(0, tp - 1))
    chunks = draw(st.none() | st.lists(st.integers(1, 3), min_size=1, max_size=3))
    chunks = chunks and [tp * each for each in chunks]
    shape[split] = sum(chunks) if chunks else tp * shape[split]
    whole = np.arange(np.prod(shape)).reshape(shape)
    ends = np.cumsum(chunks or [shape[split]])[:-1]
    parts = [np.split(chunk, tp, split)[rank] for chunk in np.split(whole, ends, split)]
    shard = np.concatenate(parts, split)

    kind: Any = {"split": split, "chunks": chunks, "tp": tp, "rank": rank}
    written = shard_metadata(tuple(shape), version="1.5", **kind)
    found = parse_metadata(PATH, written, shard.shape)
    assert (found.version, found.whole_shape) == ("1.5", tuple(shape))
    assert found.pairs == shard_pairs(tuple(shape), **kind)
    filled = np.full_like(shard, -1)
    for pair in found.pairs:
        filled[pair.local] = whole[pair.whole]
        region = pair.region("a", shard.shape, whole.shape)
        assert shard[region.local] == whole[region.whole]
        assert filled[pair.local].shape == region.sizes
    assert (filled == shard).all()


def test_every_shard_that_nanotron_wrote_is_read_and_written_alike(golden: Path) -> None:
    count = 0
    for path in golden.glob("*/tp*_pp*.json"):
        for name, file in json.loads(path.read_text())["files"].items():
            if "tp-rank" in name:
                found = parse_metadata(Path(name), file["metadata"], tuple(file["shape"]))
                text = file["metadata"]["local_global_slices_pairs"]
                assert ";".join(map(str, found.pairs)) == text
                count += 1
    assert count > 100


def test_a_tensor_that_is_not_split() -> None:
    pairs = shard_pairs((3, 4), split=None, chunks=None, tp=2, rank=1)
    assert pairs == (SlicesPair((ALL, ALL), (ALL, ALL)),)
    assert pairs[0].region("a", (3, 4), (3, 4)) == Region((0, 0), (0, 0), (3, 4))


@pytest.mark.parametrize("text", ["(np.int64(8), 6)", "(8,6)", "(np.int32(8), np.int64(6))"])
def test_shapes_as_they_may_be_printed(text: str) -> None:
    found = parse_metadata(PATH, {**METADATA, "unsharded_shape": text}, (4, 6))
    assert found.whole_shape == (8, 6)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("unsharded_shape", "", "unsharded_shape is '', and should be a shape"),
        ("unsharded_shape", "(8, -6)", r"unsharded_shape is '\(8, -6\)'"),
        ("unsharded_shape", "8, 6", "unsharded_shape is '8, 6'"),
        ("unsharded_shape", "(8)", r"2 slices of 1 dimensions"),
        ("unsharded_shape", f"({'9' * 5000},)", "unsharded_shape is '.999"),
        ("local_global_slices_pairs", "", "holds '', which is not a pair such as"),
        ("local_global_slices_pairs", "nonsense", "holds 'nonsense', which is not a pair"),
        ("local_global_slices_pairs", f"{'9' * 5000},1,None#0,1,None", "holds '999"),
        ("local_global_slices_pairs", "0,4,None|0,6,None", "which is not a pair"),
        ("local_global_slices_pairs", "0,4|0,6#4,8|0,6", "which is not a pair"),
        ("local_global_slices_pairs", "0,4,None#4,8,None", "1 slices of 2 dimensions"),
        (
            "local_global_slices_pairs",
            "0,3,None|0,6,None#4,8,None|0,6,None",
            r"of shape \[4, 6\], and 0,3,None\|.* of a tensor of \[8, 6\] is not",
        ),
        (
            "local_global_slices_pairs",
            "0,4,None|0,6,None#4,9,None|0,6,None",
            r"of shape \[4, 6\], and .*4,9,None.* of a tensor of \[8, 6\] is not",
        ),
    ],
)
def test_metadata_that_makes_no_sense(key: str, text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_metadata(PATH, {**METADATA, key: text}, (4, 6))
    assert str(caught.value).startswith(f"{PATH}: ")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("key", METADATA)
def test_metadata_that_is_missing(key: str) -> None:
    metadata = {name: text for name, text in METADATA.items() if name != key}
    with pytest.raises(CheckpointError, match=f"__metadata__ of a sharded tensor lacks '{key}'"):
        parse_metadata(PATH, metadata, (4, 6))


@pytest.mark.parametrize("step", ["2", "0"])
def test_slices_with_steps(step: str) -> None:
    pairs = f"0,4,None|0,6,None#0,8,{step}|0,6,None"
    with pytest.raises(UnmovableError, match=f"the slices of {PATH} have steps"):
        parse_metadata(PATH, {**METADATA, "local_global_slices_pairs": pairs}, (4, 6))
