"""What `make test-pythons` and `make test-versions` say of jobs that run beside each other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.side_by_side import ROOT, Steps, run

SAY = "import os, sys; print(os.getcwd(), os.environ['OMP_NUM_THREADS'], *sys.argv[1:])"
GONE = "import os; assert not {*os.environ} & {'PYTHONPATH', 'PYTHONDONTWRITEBYTECODE'}"


def test_each_job_is_told_whole_and_in_order(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/no/such/place")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")

    def good(steps: Steps) -> bool:
        return steps.passes(sys.executable, "-c", SAY, "one") and steps.passes(
            sys.executable, "-c", "import os; assert os.environ['A'] == 'b'", A="b"
        )

    def bad(steps: Steps) -> bool:
        assert steps.passes(
            sys.executable, "-c", "import os; assert 'PYTHONPATH' not in os.environ"
        )
        return steps.passes(sys.executable, "-c", "import sys; sys.exit('no good')")

    verdicts = run({"bad": bad, "good": good})
    assert [(each.name, each.word) for each in verdicts] == [("bad", "FAILED"), ("good", "ok")]
    out = capfd.readouterr().out
    assert f"== good: ok\n{ROOT} 1 one\n" in out
    assert "== bad: FAILED\nno good\n" in out
    assert "sys.exit('no good'): exit code 1\n" in out


def test_a_program_that_is_not_there_is_no_success(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        run({"absent": lambda steps: steps.passes(tmp_path / "absent")})
