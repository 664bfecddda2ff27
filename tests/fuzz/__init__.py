"""Fuzzing: `python -m tests.fuzz`, and the oracle that `make test` holds a corpus to."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOUND = ROOT / "build" / "fuzz"
CORPUS = ROOT / "tests" / "hostile" / "corpus"
MAX_INPUT_BYTES = 1 << 16
MEMORY_MIB = 2048
