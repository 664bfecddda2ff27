"""Our trainer beside real Nanotron's: the same losses, and each goes on from the other's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nanotron.installed import has_qwen2
from tests.nanotron.training import free_port
from tests.parallel.ranks import run_ranks


# Alone there is nothing that two ranks do not show, but for the families of main.
@pytest.mark.parametrize("size", [*([1] if has_qwen2() else []), 2, 4])
def test_both_train_the_same(tmp_path: Path, size: int) -> None:
    run_ranks("tests.nanotron.beside_ranks", size, str(tmp_path), str(free_port()), str(size))
