"""Inputs made of others, where there is no libFuzzer to make them, and in `make test`."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

PIECES = [
    *(b"\x00", b"\xff", b"{", b"}", b"[", b"]", b'"', b"\\u", b"\\ud800", b"-", b"9" * 5000),
    *(b"1e999", b"-1e999", b"NaN", b"Infinity", b"[" * 3000, b'{"a":' * 200, b"\r\n", b": "),
    *(b"&a [", b"*a", b"<<: *a", b"!!python/object", b"!!int ", b"!!timestamp 1", b"%", b"\t-"),
    *(b"..", b"../", b"/", b"\x7f", b"\x80", b"\x80\x02", b"(", b")", b"t", b"R", b"b", b"q\x00"),
    *(b"h\x00", b"\x94", b"2", b"0", b"\x85", b"\x8f", b"\x90", b"\x91", b"Q", b"ctorch\nSize\n"),
    *(b"ctorch\ndevice\n", b"cos\nsystem\n", b"K\x00", b"N", b"\x88", b"PK\x05\x06", b"PK\x01\x02"),
    *(struct.pack("<Q", number) for number in (0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)),
]
VALUES: list[Any] = [
    *(None, True, 0, -1, 3, 10_000, 2**31, 2**61 - 1, 2**63, 10**400, 0.5, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
    *("", "x", "../x", "..", "/", "a\0b", "a\nb", "\ud800", "é", "x" * 5000, "1e5", "9" * 5000),
    *([], [[]], [0, "x"], [10**30], [2**62] * 70, {}, {"a": {}}, {"type": []}, [None] * 50),
]


def mutated(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """A changed input: a value of its JSON in half of the cases where it has one, else bytes."""
    if chance.random() < 0.5:
        changed = _document_changed(data, chance)
        if changed is not None:
            return changed
    for _ in range(chance.choice([1, 1, 2, 4])):
        data = _bytes_changed(data, others, chance)
    return data


def _document_changed(data: bytes, chance: random.Random) -> bytes | None:
    """The first byte of an input, and perhaps eight more, stand before its document."""
    start = data.find(b"{", 0, 10)
    if start < 0:
        return None
    lines = data[start:].split(b"\n")
    try:
        json.loads(lines[0])
    except (ValueError, RecursionError):
        lines = [data[start:]]
    which = chance.randrange(len(lines))
    try:
        document = json.loads(lines[which])
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    lines[which] = json.dumps(_value_changed(document, chance)).encode()
    return data[:start] + b"\n".join(lines)


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every container in a document, with each of its keys."""
    found: list[tuple[Any, Any]] = []
    pending = [document]
    while pending:
        inner = pending.pop()
        keys = inner if isinstance(inner, dict) else range(len(inner))
        found += [(inner, key) for key in keys]
        pending += [inner[key] for key in keys if isinstance(inner[key], (dict, list))]
    return found


def _value_changed(document: Any, chance: random.Random) -> Any:
    places = _places(document)
    if not places:
        return chance.choice(VALUES)
    inner, key = chance.choice(places)
    way = chance.random()
    if way < 0.15:
        del inner[key]
    elif way < 0.3 and isinstance(inner, dict):
        inner[chance.choice(["", "x", "\ud800", "a\0", "é/..", "..", "a\nb"])] = inner.pop(key)
    elif way < 0.4:
        inner[key] = chance.choice(places)[0] if chance.random() < 0.2 else [inner[key]] * 3
    else:
        inner[key] = chance.choice(VALUES)
    try:
        json.dumps(document)
    except ValueError:  # it holds itself now
        return {}
    return document


def _bytes_changed(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    length = chance.choice([0, 0, 1, 1, 4, 8, 64, len(data)])
    way = chance.random()
    if way < 0.25 and at < len(data):
        return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
    if way < 0.35 and at < len(data):
        return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]
    if way < 0.45:
        other = chance.choice(others)
        begin = chance.randrange(len(other) + 1)
        return data[:at] + other[begin : begin + 64] + data[at + length :]
    if way < 0.55:
        return data[:at] + data[at : at + 64] * chance.choice([2, 16]) + data[at + 64 :]
    return data[:at] + chance.choice([b"", *PIECES]) + data[at + length :]
