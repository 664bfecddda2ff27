"""The memory that a benchmark says a command has held."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.watched import peak_of, run_watched


def test_a_small_command_is_small(tmp_path: Path) -> None:
    """Whatever this process holds; through a shell too, which starts it."""
    (tmp_path / "file").write_bytes(bytes(64 << 20))
    assert peak_of(os.getpid()) > 20e6
    for words in (
        ["cp", "file", "copy"],
        ["sh", "-c", "cp file copy && cp file again"],
    ):
        ended = run_watched(["env", "-C", str(tmp_path), *words], dict(os.environ))
        assert ended.status == 0
        assert 0.5e6 < ended.peak_rss_bytes < 8e6, words


def test_a_large_command_is_large() -> None:
    """Larger than this process, and smaller."""
    mine = peak_of(os.getpid())
    for held in (30 << 20, mine + (50 << 20)):
        program = f"import time; held = b'x' * {held}; time.sleep(0.1); print(len(held))"
        ended = run_watched([sys.executable, "-S", "-c", program], dict(os.environ))
        assert int(ended.stdout) == held
        assert held < ended.peak_rss_bytes < held + (25 << 20)


def test_a_command_that_fails() -> None:
    assert run_watched(["sh", "-c", "exit 3"], dict(os.environ)).status == 3
