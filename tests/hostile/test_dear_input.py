"""Small input that would take long to read, or much memory: refused for what it is."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from nanotron_fast.cli.commands import app
from nanotron_fast.errors import CheckpointError, one_line
from nanotron_fast.formats.safetensors import read_header
from nanotron_fast.formats.torch_file.pickled import unpickle
from nanotron_fast.formats.torch_file.reading import _device
from nanotron_fast.formats.yaml_file import read_yaml
from tests.fuzz.oracle import limited
from tests.modelzoo import make

PROTOCOL = b"\x80\x02"
HASH_MODULUS = 2**61 - 1


def made_of(data: bytes) -> object:
    """What a pickle makes; within a second."""
    with limited(5):
        return unpickle(PROTOCOL + data + b".", where="x", callables={}, constants={})


def integer(value: int) -> bytes:
    return b"\x8a\x40" + value.to_bytes(64, "little", signed=True)


@pytest.mark.parametrize("sign", [1, -1])
def test_numbers_that_share_a_hash_are_no_keys(sign: int) -> None:
    """A dictionary of n of them takes n * n steps."""
    assert hash(5 + HASH_MODULUS * 9) == hash(5)
    with pytest.raises(CheckpointError, match="a dictionary or a set with the key"):
        made_of(b"}" + integer(sign * HASH_MODULUS) + b"Ns")
    largest = sign * (HASH_MODULUS - 1)
    assert made_of(b"}" + integer(largest) + b"Ns") == {largest: None}


def test_so_many_tuples_are_no_keys() -> None:
    pair = b"".join(b"K\x00M" + struct.pack("<H", n) + b"\x86N" for n in range(4096))
    assert len(made_of(b"}(" + pair + b"u")) == 4096  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="an unusual key"):
        made_of(b"}(" + pair + b"K\x01K\x01\x86N" + b"u")


@pytest.mark.parametrize("empty", [b"]", b"}", b"\x8f", b"(1", b"N\x85", b"(t"])
def test_containers_cost_more_than_they_take(empty: bytes) -> None:
    """An empty set takes 216 bytes of memory and one of a pickle."""
    with pytest.raises(CheckpointError, match="more lists, tuples, sets and dictionaries than"):
        made_of(b"(" + empty * 20_000 + b"t")


def test_a_device_is_of_text_and_numbers() -> None:
    """The text of parts that lie in each other many times over is longer than any memory."""
    assert _device("cuda", 1) == "cuda:1"
    with pytest.raises(ValueError, match="other things than text and numbers"):
        _device(((1,),))


def header_of(path: Path, document: str) -> Path:
    raw = document.encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    return path


def test_a_name_that_is_there_twice_among_many(tmp_path: Path) -> None:
    """It is found in one walk, not in one for each name."""
    names = [*map(str, range(60_000)), "59999"]
    entry = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
    document = "{" + ",".join(f'"{name}":{entry}' for name in names) + "}"
    path = header_of(tmp_path / "x.safetensors", document)
    with limited(10), pytest.raises(CheckpointError, match="names '59999' twice"):
        read_header(path)


def test_dimensions_without_end(tmp_path: Path) -> None:
    """Their product is a number of many digits, and takes long to find."""
    entry = {"dtype": "F32", "shape": [2**62] * 200_000, "data_offsets": [0, 4]}
    path = header_of(tmp_path / "x.safetensors", json.dumps({"a": entry}))
    message = "a: 200,000 dimensions are over the limit of 64"
    with limited(5), pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_messages_do_not_repeat_all_of_it(tmp_path: Path) -> None:
    entry = {"dtype": "F" * 10_000, "shape": "x" * 10_000, "data_offsets": [0, 4]}
    offsets = {"dtype": "F32", "shape": [1], "data_offsets": [0] * 9999}
    for change in ({}, {"dtype": "F32"}, offsets):
        path = header_of(tmp_path / "x.safetensors", json.dumps({"a": {**entry, **change}}))
        with pytest.raises(CheckpointError, match=r"is not a list|unknown dtype|not two") as caught:
            read_header(path)
        assert len(str(caught.value)) < 1000


MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}\n" for level in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MERGES, "written out, it would have more than 1,000,000 values"),
        ("a: &a\n  b: *a\n", "a holds itself"),
        ("a: &a [*a]\n", "a holds itself"),
        ("a: 1" + ":1" * 100_000, "it holds a number of 200,001 characters"),
        ("a: !!int '1" + ":1" * 100_000 + "'", "it holds a number of 200,001 characters"),
        ("a: " + "x" * (4 << 20), "bytes are over the limit of 4,194,304 for a configuration"),
        ("[" * 100, "nested more than 64 deep"),
    ],
)
def test_yaml(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with limited(5), pytest.raises(CheckpointError, match=message):
        read_yaml(path)


def test_yaml_may_repeat_itself(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("a: &a {x: 1, y: 1:30}\nb: {<<: *a, x: 2}\nc: [*a, *a]\nd: &d 7\ne: *d\n")
    assert read_yaml(path) == {
        "a": {"x": 1, "y": 90},
        "b": {"x": 2, "y": 90},
        "c": [{"x": 1, "y": 90}] * 2,
        "d": 7,
        "e": 7,
    }


def test_what_a_command_prints_is_one_line() -> None:
    assert one_line(ValueError("a\nb\r\x1b[31mß\ud800 \t")) == r"a\nb\r\x1b[31mß\ud800 \t"


@pytest.mark.parametrize("words", [["inspect"], ["convert"], ["verify"], ["reshard"]])
@pytest.mark.parametrize("kind", ["index", "config", "header", "metadata"])
def test_commands_end_with_two_and_one_line(words: list[str], kind: str, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    source = make("llama", num_hidden_layers=1).save(tmp_path / "in", shards=2)
    index = source / "model.safetensors.index.json"
    if kind == "index":
        document = json.loads(index.read_text())
        document["weight_map"]["model.norm.weight"] = "a\nb"
        index.write_text(json.dumps(document))
    elif kind == "config":
        (source / "config.json").write_text('{"model_type": "llama\\n')
    elif kind == "header":
        header_of(source / "model-00001-of-00002.safetensors", "{" + '"a":[' * 5000)
    else:
        for path in source.iterdir():
            path.unlink()
        (source / ".metadata").write_bytes(PROTOCOL + b"cos\nsystem\nX\x01\0\0\0y\x85R.")
    destination = {"inspect": [], "verify": [source]}.get(words[0], [tmp_path / "out"])
    result = CliRunner().invoke(app, [*words, *map(str, (source, *destination))])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
