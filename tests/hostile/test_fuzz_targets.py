"""The targets of `make fuzz`, over what they found once and some mutations of good input."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nanotron_fast.errors import CheckpointError
from tests.fuzz import CORPUS
from tests.fuzz.mutations import mutated
from tests.fuzz.oracle import Finding, check, make_box, tracing
from tests.fuzz.targets import TARGETS, templates

# Of inputs to each target; those that make a whole plan of each are slower.
MANY, FEW = 80, 6
FAST = ("header", "torch_file")
FILES = sorted(path.name for path in CORPUS.iterdir())


@pytest.fixture
def box(tmp_path: Path) -> Path:
    templates()  # which no limit of time is for
    return make_box(tmp_path / "box")


@pytest.mark.parametrize("name", FILES)
def test_what_was_found_once(name: str, box: Path) -> None:
    """It is taken or refused, in time and in the memory that its size allows."""
    data = (CORPUS / name).read_bytes()
    target = TARGETS[name.partition("-")[0]]
    if target.name == "leftovers":  # whole conversions, which are slow where memory is counted
        check(target, data, box)
        return
    with tracing():
        check(target, data, box, traces_memory=True)


@pytest.mark.parametrize("name", [*TARGETS])
def test_mutations(name: str, box: Path) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    chance = random.Random(name)
    for seed in seeds[:3]:
        check(target, seed, box)
    for _ in range(MANY if name in FAST else FEW):
        data = mutated(chance.choice(seeds), seeds, chance)
        try:
            check(target, data, box)
        except Finding as finding:
            kept = box.parent / "input"
            kept.write_bytes(data)
            raise AssertionError(f"{kept}: {finding}") from None


class Bad:
    """A target with every fault that the oracle is there for."""

    name = "bad"

    def seeds(self) -> list[bytes]:
        return []

    def run(self, data: bytes, box: Path) -> None:
        if data == b"error":
            raise KeyError("x")
        if data == b"refusal":
            raise CheckpointError("no\nmore")
        if data == b"long":
            raise CheckpointError("x" * 20_000)
        if data == b"memory":
            bytearray(100 << 20)
        while data == b"time":
            pass
        if data == b"write":
            (box / "outside" / "new").write_bytes(b"")
        if data == b"delete":
            (box / "canary").unlink()
        (box / "work" / "x").write_bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"error", "KeyError comes out of it"),
        (b"long", "refused in 20,000 characters"),
        (b"memory", "6 bytes of it take 1"),
        (b"time", "longer than 0.2 s"),
        (b"write", "changes what is not its own: outside/new"),
        (b"delete", "changes what is not its own: canary"),
    ],
)
def test_the_oracle_sees(
    data: bytes, message: str, box: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if data == b"time":  # the others may wait for a busy machine
        monkeypatch.setattr("tests.fuzz.oracle.SECONDS", 0.2)
    with tracing(), pytest.raises(Finding, match=message):
        check(Bad(), data, box, traces_memory=True)


def test_the_oracle_takes(box: Path) -> None:
    assert check(Bad(), b"good", box) is None
    assert check(Bad(), b"refusal", box) == r"no\nmore"
