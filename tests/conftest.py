"""Fixtures that many tests use."""

from __future__ import annotations

from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden() -> Path:
    """Where real Nanotron's output lies."""
    return GOLDEN


@pytest.fixture
def golden_hf() -> Path:
    """A Hugging Face llama."""
    return GOLDEN / "llama_untied" / "hf"
