"""A forked process ends, and says so, as one that `python` begins."""

from __future__ import annotations

import signal
from pathlib import Path

from tests import forks

SCRIPT = """
import os, signal, sys
print("begins", sys.argv[1], "torch" in sys.modules)
match os.environ["RANK"]:
    case "1":
        sys.exit(7)
    case "2":
        sys.exit("why")
    case "3":
        raise ValueError("odd")
    case "4":
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_exit_codes_and_streams(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environments = [{"RANK": str(rank)} for rank in range(5)]
    results = forks.run([script, "word"], environments, tmp_path, timeout_seconds=120)
    assert [result.code for result in results] == [0, 7, 1, 1, -signal.SIGKILL]
    assert {result.out for result in results} == {"begins word True\n"}
    errors = [result.err for result in results]
    assert errors[:3] == ["", "", "why\n"]
    assert errors[3].startswith("Traceback")
    assert errors[3].endswith("ValueError: odd\n")
