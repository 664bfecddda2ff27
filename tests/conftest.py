"""Fixtures that many tests use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

# Triton reads this when a kernel is defined. Without a GPU its interpreter runs the same kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def golden() -> Path:
    """Where real Nanotron's output lies."""
    return GOLDEN


@pytest.fixture
def golden_hf() -> Path:
    """A Hugging Face llama."""
    return GOLDEN / "llama_untied" / "hf"
