"""Fixtures of stores."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from nanotron_fast.checkpoints.remote import store
from tests.checkpoints.remote.stores import FaultyFileSystem


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FaultyFileSystem]]:
    """An empty store that can fail, and no pauses between tries."""
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.clear()
    monkeypatch.setattr(store, "FIRST_PAUSE_SECONDS", 0.001)
    yield FaultyFileSystem
    FaultyFileSystem.clear()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files: what is in it was left there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder
