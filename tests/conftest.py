"""Fixtures that many tests use."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

# A shell's background job ignores SIGINT, and so would every command that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton reads this when a kernel is defined. Without a GPU its interpreter runs the same kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu", action="store_true", help="skip every test where there is no CUDA device"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--gpu") and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device here"))


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A command that ran in this process ignores signals at its end: the next test shall not."""
    before = {
        each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.fixture
def golden() -> Path:
    """Where real Nanotron's output lies."""
    return GOLDEN


@pytest.fixture
def golden_hf() -> Path:
    """A Hugging Face llama."""
    return GOLDEN / "llama_untied" / "hf"
