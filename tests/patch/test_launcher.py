"""`nanotron-fast run` where it cannot run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.py"], "absent.py: there is no such script"),
        (["--ops", "glue", "script.py"], "unknown operations glue: choose from"),
        (["--z-loss", "right", "script.py"], "z_loss_mode is 'right'"),
        (["--ops", "glu", "--rope-scaling", "script.py"], 'needs the operation "rope"'),
        (["script.py"], "pip install nanotron"),
    ],
)
def test_bad_usage_is_exit_code_2(tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "script.py").write_text("raise AssertionError('it ran')")
    blocked = "import sys; sys.modules['nanotron'] = None; sys.argv[0] = 'nanotron-fast'\n"
    program = "from nanotron_fast.cli.commands import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", blocked + program, "run", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
