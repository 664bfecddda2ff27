"""Malformed safetensors files: each is refused with a CheckpointError that names the file."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanotron_fast.errors import CheckpointError
from nanotron_fast.formats.safetensors import Header, read_header
from tests.modelzoo import Tensor, safetensors_bytes

GOOD = safetensors_bytes(
    [("a", Tensor("BF16", (2, 3), bytes(range(12)))), ("b", Tensor("F32", (), b"abcd"))],
    {"format": "pt"},
)
A: dict[str, Any] = {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}
HUGE = 2**64


def file_with(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def entry(**changes: Any) -> bytes:
    return file_with(json.dumps({"a": {**A, **changes}}).encode(), bytes(12))


def tensors(*offsets: tuple[int, int], size: int) -> bytes:
    """U8 tensors at these offsets, in a file with so many bytes of data."""
    document = {
        f"t{number}": {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for number, (begin, end) in enumerate(offsets)
    }
    return file_with(json.dumps(document).encode(), bytes(size))


def read(data: bytes, tmp_path: Path) -> Header:
    path = tmp_path / "case.safetensors"
    path.write_bytes(data)
    return read_header(path)


def refused(data: bytes, tmp_path: Path, message: str = "") -> None:
    with pytest.raises(CheckpointError, match=f"case.safetensors: .*{message}"):
        read(data, tmp_path)


def test_the_good_one(tmp_path: Path) -> None:
    header = read(GOOD, tmp_path)
    assert {name: info.shape for name, info in header.tensors.items()} == {"a": (2, 3), "b": ()}
    assert header.metadata == {"format": "pt"}


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_truncated_at_every_byte(length: int, tmp_path: Path) -> None:
    refused(GOOD[:length], tmp_path)


@pytest.mark.parametrize("extra", [1, 7, 8, 4096])
def test_trailing_bytes(extra: int, tmp_path: Path) -> None:
    refused(GOOD + bytes(extra), tmp_path, f"the last {extra} bytes belong to no tensor")


@pytest.mark.parametrize(
    "length", [100_000_001, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]
)
def test_header_length_over_the_limit(length: int, tmp_path: Path) -> None:
    data = struct.pack("<Q", length) + GOOD[8:]
    refused(data, tmp_path, f"a header of {length} bytes is over the limit")


@pytest.mark.parametrize("length", [0, 1, 2])
def test_header_length_too_small(length: int, tmp_path: Path) -> None:
    refused(struct.pack("<Q", length) + GOOD[8:], tmp_path)


def test_header_length_past_the_end(tmp_path: Path) -> None:
    refused(struct.pack("<Q", len(GOOD)) + GOOD[8:], tmp_path, "truncated")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "does not start with"),
        (b"null", "does not start with"),
        (b"[]", "does not start with"),
        (b'"a"', "does not start with"),
        (b"1", "does not start with"),
        (b" {}", "does not start with"),
        (b"\xef\xbb\xbf{}", "does not start with"),
        (b"{", "not JSON"),
        (b"{}}", "not JSON"),
        (b"{}\0", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": }', "not JSON"),
        (b'{"a": 1,}', "not JSON"),
        (b'{"\xff": 1}', "not UTF-8 at byte 2"),
        (b'{"a": "\xc3\x28"}', "not UTF-8"),
        (b'{"\xed\xa0\x80": 1}', "not UTF-8"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "too long"),
    ],
)
def test_not_a_json_object(header: bytes, message: str, tmp_path: Path) -> None:
    refused(file_with(header), tmp_path, message)


def test_duplicate_names(tmp_path: Path) -> None:
    one = json.dumps(A)
    refused(file_with(f'{{"a":{one},"a":{one}}}'.encode(), bytes(12)), tmp_path, "'a' twice")
    refused(file_with(f'{{"a":{one},"\\u0061":{one}}}'.encode(), bytes(12)), tmp_path, "'a' twice")


def test_duplicate_keys_of_an_entry(tmp_path: Path) -> None:
    one = json.dumps(A)[:-1] + ', "dtype": "F16"}'
    refused(file_with(f'{{"a":{one}}}'.encode(), bytes(12)), tmp_path, "'dtype' twice")


def test_duplicate_metadata(tmp_path: Path) -> None:
    header = f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{json.dumps(A)}}}'
    refused(file_with(header.encode(), bytes(12)), tmp_path, "'__metadata__' twice")


@pytest.mark.parametrize("value", [None, 1, [], "a", {}, {"dtype": "U8"}, [A], True])
def test_entry_of_another_kind(value: Any, tmp_path: Path) -> None:
    header = json.dumps({"a": value}).encode()
    refused(file_with(header, bytes(12)), tmp_path, "a: an entry has dtype, shape")


def test_an_entry_with_a_further_key_is_read(tmp_path: Path) -> None:
    assert read(entry(extra={"x": 1}), tmp_path).tensors["a"].shape == (2, 3)


@pytest.mark.parametrize("dtype", ["", "bf16", "BF17", "F128", " BF16", None, 16, True, [], {}])
def test_unknown_dtype(dtype: Any, tmp_path: Path) -> None:
    refused(entry(dtype=dtype), tmp_path, "a: unknown dtype")


@pytest.mark.parametrize(
    "shape",
    [
        None,
        6,
        "6",
        {},
        [-2, -3],
        [2.0, 3],
        [True, 6],
        ["2", 3],
        [None],
        [[2, 3]],
        [HUGE],
        [2**63],
        [float("inf")],
        [float("nan")],
    ],
)
def test_shape_that_is_none(shape: Any, tmp_path: Path) -> None:
    refused(entry(shape=shape), tmp_path, "a: shape .* is not a list of sizes")


@pytest.mark.parametrize(
    "shape", [[2**32, 2**32], [2**62], [2**63 - 1, 2], [2**31, 2**31, 2**31], [2**63 - 1] * 60]
)
def test_shape_that_overflows(shape: Any, tmp_path: Path) -> None:
    refused(entry(shape=shape), tmp_path, "a: shape .* overflows")


def test_shape_that_wraps_around_to_the_right_size(tmp_path: Path) -> None:
    """2**63 x 2 elements of 2 bytes is 0 bytes to a program that counts in 64 bits."""
    refused(entry(shape=[2**62, 4], data_offsets=[0, 0]), tmp_path, "overflows")


@pytest.mark.parametrize(
    "offsets",
    [
        None,
        12,
        [],
        [0],
        [0, 6, 12],
        [-12, 0],
        [0.0, 12],
        ["0", "12"],
        [False, 12],
        [HUGE, HUGE + 12],
        {"begin": 0},
        [0, None],
    ],
)
def test_offsets_that_are_none(offsets: Any, tmp_path: Path) -> None:
    refused(entry(data_offsets=offsets), tmp_path, "a: data_offsets .* are not two offsets")


@pytest.mark.parametrize("offsets", [[12, 0], [0, 11], [0, 13], [1, 12], [0, 2**62]])
def test_offsets_of_another_size(offsets: Any, tmp_path: Path) -> None:
    refused(entry(data_offsets=offsets), tmp_path, "a: BF16 of shape .* takes 12 bytes")


def test_offsets_past_the_end(tmp_path: Path) -> None:
    refused(entry(data_offsets=[2**62, 2**62 + 12]), tmp_path)
    refused(entry(data_offsets=[2**63 - 13, 2**63 - 1]), tmp_path)


@pytest.mark.parametrize(
    "offsets", [[(0, 4), (2, 6)], [(0, 4), (0, 4)], [(0, 4), (1, 3)], [(0, 4), (2, 2)]]
)
def test_overlapping(offsets: list[tuple[int, int]], tmp_path: Path) -> None:
    refused(tensors(*offsets, size=6), tmp_path, "inside the tensor before it")


@pytest.mark.parametrize("offsets", [[(1, 4)], [(0, 2), (3, 4)], [(3, 4), (0, 2)], [(4, 4)]])
def test_holes(offsets: list[tuple[int, int]], tmp_path: Path) -> None:
    refused(tensors(*offsets, size=4), tmp_path, "belong to no tensor")


def test_bits_that_are_no_bytes(tmp_path: Path) -> None:
    refused(entry(dtype="F4", shape=[3], data_offsets=[0, 1]), tmp_path, "F4 of shape")


@pytest.mark.parametrize(
    "metadata", [1, "a", [], True, {"a": 1}, {"a": None}, {"a": {}}, {"a": ["b"]}]
)
def test_bad_metadata(metadata: Any, tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": metadata, "a": A}).encode()
    refused(file_with(header, bytes(12)), tmp_path, "__metadata__ does not map strings to strings")


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\x1b[31m", "\ud800"])
def test_names_that_are_no_names(name: str, tmp_path: Path) -> None:
    header = json.dumps({name: A}).encode()
    refused(file_with(header, bytes(12)), tmp_path, "is not a tensor's name")


def test_empty_tensors_are_fine(tmp_path: Path) -> None:
    header = read(tensors((0, 0), (0, 4), (4, 4), size=4), tmp_path)
    assert [info.num_elements for info in header.tensors.values()] == [0, 4, 0]


def test_no_tensors_is_fine(tmp_path: Path) -> None:
    assert read(file_with(b"{}"), tmp_path).tensors == {}


def test_random_bytes_changed(tmp_path: Path) -> None:
    """A thousand files with a few bytes of the header changed: read, or refused."""
    rng = random.Random(0)
    end = 8 + int.from_bytes(GOOD[:8], "little")
    num_refused = 0
    for _ in range(1000):
        data = bytearray(GOOD)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(end)] = rng.choice(b'\0 "{}[]:,-0179azAZ\xff')
        try:
            read(bytes(data), tmp_path)
        except CheckpointError:
            num_refused += 1
    assert num_refused > 800


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    key=st.sampled_from(["dtype", "shape", "data_offsets", "a", "__metadata__"]),
    value=JSON,
)
def test_any_json_in_any_place(key: str, value: Any, tmp_path: Path) -> None:
    document: dict[str, Any] = {"a": {**A}}
    (document if key in ("a", "__metadata__") else document["a"])[key] = value
    try:
        read(file_with(json.dumps(document).encode(), bytes(12)), tmp_path)
    except CheckpointError:
        return
