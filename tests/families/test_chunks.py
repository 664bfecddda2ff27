"""A part in the chunks of a tensor, against numpy: each element in one chunk, at its place."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from nanotron_fast.families.parts import Param, Share
from nanotron_fast.families.rules import Context, Copy, Fuse, FuseByKvHead, Rule, StackExperts
from nanotron_fast.moves.boxes import row_major

SIZES = {
    "hidden": 6,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 10,
    "first": 2,
    "end": 8,
    "experts": 3,
    "inter": 8,
    "vocab": 11,
    "padded_vocab": 16,
}
HEADS = ("heads", "head_dim")
KV_HEADS = ("kv_heads", "head_dim")
RULES: dict[str, Rule] = {
    "vocabulary": Copy("x", "x", rows="vocab", columns="hidden", split="rows"),
    "vector": Copy("x", "x", rows="hidden"),
    "columns of heads": Copy("x", "x", rows="hidden", columns=HEADS, split="columns"),
    "rows of heads": Copy("x", "x", rows=HEADS, columns="hidden", split="rows"),
    "rotary": Fuse(
        ("q", "v"), "x", rows=(HEADS, KV_HEADS), columns="hidden", rotary=(("first", "end"), None)
    ),
    "one tensor": Fuse(
        "qkv",
        "x",
        rows=(HEADS, KV_HEADS, KV_HEADS),
        columns="hidden",
        rotary=(("first", "end"), ("first", "end"), None),
    ),
    "rotary bias": Fuse(("q",), "x", rows=(HEADS,), rotary=(("first", "end"),)),
    "by kv head": FuseByKvHead(("q", "k", "v"), "x", columns="hidden"),
    "experts": StackExperts(("{expert}.gate", "{expert}.up"), "both", "x", "inter", "hidden"),
}


def cuts(rng: random.Random, shape: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    """Random places where each dimension is cut, as (first, length)."""
    found = []
    for size in shape:
        inside = rng.sample(range(1, size), min(size - 1, rng.randrange(4)))
        edges = [0, *sorted(inside), size]
        found.append([(a, b - a) for a, b in itertools.pairwise(edges)])
    return found


def view(data: np.ndarray, share: Share) -> np.ndarray:
    """The elements of a share in a flat array."""
    size = [high - low for low, high in zip(share.low, share.high, strict=True)]
    strides = [stride * data.itemsize for stride in share.strides]
    return np.lib.stride_tricks.as_strided(data.reshape(-1)[share.offset :], size, strides)


def expand(rule: Rule, tensors_interleaved: bool) -> Param:
    context = Context(SIZES, frozenset(), False, tensors_interleaved, 0, tensors_interleaved)
    return rule.expand("x", context)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_chunks_at_any_place(name: str, interleaved: bool) -> None:
    rng = random.Random(f"{name} {interleaved}")
    for part in expand(RULES[name], interleaved).parts:
        for address in part.tensors:
            whole = np.arange(int(np.prod(address.shape)), dtype=np.int64).reshape(address.shape)
            share = part.whole(address)
            expected = view(whole, share)
            for _ in range(20):
                found = np.full(expected.shape, -1, np.int64)
                num_written = 0
                for ranges in itertools.product(*cuts(rng, address.shape)):
                    low, sizes = [at for at, _ in ranges], [length for _, length in ranges]
                    chunk = np.ascontiguousarray(
                        whole[tuple(slice(at, at + length) for at, length in ranges)]
                    )
                    for piece in part.within(address, low, sizes, row_major(chunk.shape)):
                        (a, b, c), (d, e, f) = piece.low, piece.high
                        found[a:d, b:e, c:f] = view(chunk, piece)
                        num_written += (d - a) * (e - b) * (f - c)
                assert np.array_equal(found, expected)
                assert num_written == expected.size


def test_a_chunk_that_is_the_tensor_is_one_share() -> None:
    part = expand(RULES["columns of heads"], False).parts[0]
    address = part.tensors[0]
    assert list(part.within(address, (0, 0), address.shape, row_major(address.shape))) == [
        part.whole(address)
    ]


def test_a_chunk_that_ends_inside_a_head() -> None:
    """The end of a head, whole heads, the beginning of a head."""
    part = expand(RULES["rows of heads"], False).parts[0]
    shares = list(part.within(part.tensors[0], (7, 0), (26, 6), (6, 1)))
    boxes = sorted((share.low, share.high) for share in shares)
    assert boxes == [
        ((0, 7, 0), (1, 10, 6)),
        ((1, 0, 0), (3, 10, 6)),
        ((3, 0, 0), (4, 3, 6)),
    ]


def test_a_chunk_elsewhere_holds_nothing() -> None:
    first = expand(RULES["rotary"], False).parts[0]
    assert first.sizes == (4, 10, 6)
    halves = expand(RULES["rotary"], True).parts
    # Of rows 0 and 1 of a head, neither is turned.
    assert [
        len(list(part.within(part.tensors[0], (0, 0), (2, 6), (6, 1)))) for part in halves[:4]
    ] == [
        1,
        0,
        0,
        0,
    ]


@pytest.mark.parametrize("in_nanotron", [False, True])
def test_rotary_pairs_of_torchtitan(in_nanotron: bool) -> None:
    """Its rows of a head are x0 y0 x1 y1 ... where Hugging Face has x0 x1 ... y0 y1 ..."""
    rule = Fuse(("q",), "q", rows=(HEADS,), columns="hidden", rotary=(("zero", "head_dim"),))
    context = Context({**SIZES, "zero": 0}, frozenset(), in_nanotron, True, 0, True)
    param = rule.expand("q", context)
    halves = np.arange(240).reshape(4, 2, 5, 6)
    pairs = np.ascontiguousarray(halves.swapaxes(1, 2))
    found = np.full(param.shape, -1)
    for part in param.parts:
        view(found, param.share(part, {}, {}))[:] = view(pairs, part.whole(part.tensors[0]))
    assert np.array_equal(found, (pairs if in_nanotron else halves).reshape(40, 6))


def test_a_chunk_that_lies_transposed() -> None:
    part = expand(RULES["rows of heads"], False).parts[0]
    whole = np.arange(240).reshape(40, 6)
    chunk = np.ascontiguousarray(whole[7:33].T)
    found = np.full(part.sizes, -1)
    for piece in part.within(part.tensors[0], (7, 0), (26, 6), (1, 26)):
        (a, b, c), (d, e, f) = piece.low, piece.high
        found[a:d, b:e, c:f] = view(chunk, piece)
    assert np.array_equal(found.reshape(40, 6)[7:33], whole[7:33])
    assert (found.reshape(40, 6)[:7] == -1).all()
