"""The drop-in's save_weights and load_weights beside Nanotron's own, at several topologies."""

from __future__ import annotations

from pathlib import Path

from tests.nanotron.training import free_port
from tests.parallel.ranks import run_ranks


def test_they_do_what_nanotrons_do(tmp_path: Path) -> None:
    run_ranks("tests.nanotron.checkpoint_ranks", 2, str(tmp_path), str(free_port()))
