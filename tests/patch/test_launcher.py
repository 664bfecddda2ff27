"""`nanotron-fast run` where it cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanotron_fast.cli.commands import app


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a script lies that must not run; the variables of a rank are taken back."""
    (tmp_path / "script.py").write_text("raise AssertionError('it ran')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "nanotron", None)
    kept = dict(os.environ)
    yield tmp_path
    os.environ.clear()
    os.environ.update(kept)


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
def test_bad_usage_is_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["run", *words])
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown


def test_the_command_ends_with_that_code(folder: Path) -> None:
    """A process of its own, in which Nanotron cannot be imported."""
    program = (
        "import sys; sys.modules['nanotron'] = None; sys.argv[0] = 'nanotron-fast'\n"
        "from nanotron_fast.cli.commands import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "run", "script.py"],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert result.returncode == 2, result.stderr
    assert "pip install nanotron" in result.stderr
    assert "Traceback" not in result.stderr
