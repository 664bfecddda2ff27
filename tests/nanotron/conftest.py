"""These tests need a real Nanotron: `make test-nanotron` makes an environment that has one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nanotron import installed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if installed.folder() is not None:
        return
    skip = pytest.mark.skip(reason="nanotron is not installed here: run `make test-nanotron`")
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(skip)
