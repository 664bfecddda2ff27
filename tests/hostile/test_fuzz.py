"""Small files changed at random: only this package's errors and OSError may come out."""

from __future__ import annotations

import functools
import json
import random
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import nanotron_fast
from nanotron_fast.checkpoints.options import Options
from nanotron_fast.checkpoints.plan.compare import plan_comparison
from nanotron_fast.checkpoints.plan.load import plan_load
from nanotron_fast.checkpoints.source import read, resolve
from nanotron_fast.errors import NanotronFastError
from tests.modelzoo import make

NUM_TRIES = 60
VALUES: list[Any] = [
    *(None, True, 0, -1, 3, 10_000, 2**63, 10**400, 0.5, 1e308, float("nan"), float("-inf")),
    *("", "x", "../x", "/", "a\0b", "\ud800", "\udc80", "é", "x" * 5000, "1e5", "{layer}", "%s"),
    *([], [[]], [0, "x"], [10**30], {}, {"a": {}}, {"type": []}, [None] * 50),
]
PIECES = [
    *(b"\x00", b"\xff", b"{", b"}", b"[", b'"', b"\\u", b"-", b"9" * 5000, b"1e999", b"NaN"),
    *(b"[" * 3000, b'{"a":' * 200, b"\r\n", b": ", b"&a", b"*a", b"!!python/object", b"%", b"\t-"),
]


@functools.cache
def checkpoints(family: str) -> tuple[Path, Path, Path]:
    """A model in both formats, and a folder of training steps."""
    root = Path(tempfile.mkdtemp(prefix="nanotron_fast-fuzz-"))
    hf = make(family, num_hidden_layers=2).save(root / "hf", shards=2)
    for name in ("generation_config.json", "tokenizer_config.json"):
        (hf / name).write_text('{"eos_token_id": [1, 2], "add_bos_token": true}')
    steps = root / "steps"
    nanotron_fast.convert(hf, steps / "10", topology=nanotron_fast.Topology(tp=2))
    (steps / "latest.txt").write_text("10")
    return hf, steps / "10", steps


def use(root: Path, other: Path) -> None:
    """Everything that reads a checkpoint, short of its tensors."""
    for call in (
        lambda: nanotron_fast.plan(root, root.parent / "out"),
        lambda: nanotron_fast.inspect(root),
        lambda: plan_comparison(read(resolve(root)), read(other), Options()),
        lambda: plan_load(read(resolve(root)), {}, 0, Options()),
    ):
        with suppress(NanotronFastError, OSError):
            call()


def paths_in(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document."""
    found = [path]
    if isinstance(document, dict):
        for key, value in document.items():
            found += paths_in(value, (*path, key))
    elif isinstance(document, list):
        for index, value in enumerate(document):
            found += paths_in(value, (*path, index))
    return found


def change_document(document: Any, chance: random.Random) -> Any:
    """One value replaced, one key gone, renamed or new."""
    path = chance.choice(paths_in(document))
    if not path:
        return chance.choice(VALUES) if chance.random() < 0.2 else {**document, "x": 1}
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    way = chance.random()
    if way < 0.2:
        del inner[path[-1]]
    elif way < 0.3 and isinstance(inner, dict):
        inner[chance.choice(["", "x", "\ud800", "a\0", "é/.."])] = inner.pop(path[-1])
    else:
        inner[path[-1]] = chance.choice(VALUES)
    return document


def change_bytes(data: bytes, chance: random.Random) -> bytes:
    """A piece put in, taken out or written over."""
    at = chance.randrange(len(data) + 1)
    length = chance.choice([0, 1, 8, len(data)])
    return data[:at] + chance.choice([b"", *PIECES]) + data[at + length :]


def change_header(data: bytes, chance: random.Random) -> bytes:
    """The document in a safetensors file, with a length that fits it more often than not."""
    end = 8 + int.from_bytes(data[:8], "little")
    if chance.random() < 0.4:
        return change_bytes(data[:end], chance) + data[end:]
    header = json.dumps(change_document(json.loads(data[8:end]), chance)).encode()
    return len(header).to_bytes(8, "little") + header + data[end:]


def small_files(root: Path) -> list[Path]:
    """Those to change: the documents, and one file of tensors."""
    documents = [path for path in sorted(root.iterdir()) if path.suffix in (".json", ".yaml")]
    return [*documents, min(root.rglob("*.safetensors"))]


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
@pytest.mark.parametrize("is_nanotron", [False, True])
def test_changed_files(family: str, is_nanotron: bool) -> None:
    hf, nanotron, steps = checkpoints(family)
    root, other = (nanotron, hf) if is_nanotron else (hf, nanotron)
    chance = random.Random(f"{family} {is_nanotron}")
    files = [*small_files(root), *([steps / "latest.txt"] if is_nanotron else [])]
    for path in files:
        original = path.read_bytes()
        try:
            for _ in range(NUM_TRIES // len(files) + 1):
                if path.suffix == ".safetensors":
                    data = change_header(original, chance)
                elif path.suffix == ".json" and chance.random() < 0.7:
                    data = json.dumps(change_document(json.loads(original), chance)).encode()
                else:
                    data = change_bytes(original, chance)
                path.write_bytes(data)
                use(steps if path.name == "latest.txt" else root, other)
        finally:
            path.write_bytes(original)
