"""Tokenizers in folders, and a cache of each test's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train.data.material import CHAT_TEMPLATE, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer without special tokens of its own around a text, and with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    return make_tokenizer(folder, chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def bos_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that puts <s> before a text."""
    return make_tokenizer(tmp_path_factory.mktemp("bos"), bos=True)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Any:
    from nanotron_fast.train.data.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer_folder)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tokens of text are kept here, and not with those of the user."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("NANOTRON_FAST_CACHE", str(folder))
    return folder
