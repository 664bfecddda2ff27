"""Fixtures that many tests use."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanotron_fast.extras import is_installed
from tests.interpreter import patch_once_a_launch

GOLDEN = Path(__file__).parent / "golden"


def _has_gpu() -> bool:
    if not is_installed("torch"):  # as on the interpreters of `make test-pythons`
        return False
    import torch

    return torch.cuda.is_available()


HAS_GPU = _has_gpu()
# Triton reads this when a kernel is defined. Without a GPU its interpreter runs the same kernels.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu", action="store_true", help="skip every test where there is no CUDA device"
    )
    parser.addoption(
        "--every-binary",
        action="store_true",
        help="compile every kernel launch in every configuration for every architecture",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--gpu") and not HAS_GPU:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device here"))
    if hasattr(config, "workerinput"):
        # The longest files first, so that no worker begins one when the others have nothing left.
        counts = Counter(item.path for item in items)
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: (item.path not in slow, -counts[item.path], item.path))


def pytest_collection_finish() -> None:
    """All files of tests are imported, and the interpreter with them if any needs it."""
    patch_once_a_launch()


@pytest.fixture(scope="session", autouse=True)
def commands_hear_signals() -> Iterator[None]:
    """A shell's background job ignores SIGINT, and nohup SIGHUP; so would whatever a test starts.

    A handler is not handed down as SIG_IGN is. These tests themselves end no sooner for it: SIGHUP
    and SIGTERM stay without effect on them.
    """
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: lambda *_: None,
        signal.SIGHUP: lambda *_: None,
    }
    ignored = [number for number in handlers if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, handlers[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


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
