"""Runs jobs that are mostly processes, a few at a time. What each has said is shown as one.

For `tests.pythons` and `tests.versions`, whose jobs use one core each.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple, TextIO

ROOT = Path(__file__).resolve().parents[1]
# More would want more memory than a small machine has.
MAX_AT_A_TIME = 4
# What a job installs is cached as it is imported, wherever else an environment forbids that.
LEFT_OUT = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")


class Verdict(NamedTuple):
    name: str
    word: str  # "ok" or "FAILED"
    seconds: float


class Steps:
    """The processes of one job, whose output goes to one file."""

    def __init__(self, log: TextIO) -> None:
        self._log = log
        kept = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
        self._environment = {**kept, "OMP_NUM_THREADS": "1"}

    def passes(self, *words: str | Path, **variables: str) -> bool:
        """Whether a process ends with 0, in the repository and with more variables."""
        code = subprocess.run(
            words,
            cwd=ROOT,
            env={**self._environment, **variables},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        ).returncode
        if code != 0:
            self._log.write(f"{' '.join(map(str, words))}: exit code {code}\n")
            self._log.flush()
        return code == 0


def run(jobs: Mapping[str, Callable[[Steps], bool]]) -> Sequence[Verdict]:
    """Runs jobs by name, as many at a time as there are cores; verdicts in their order."""
    printing = Lock()

    def story(name: str) -> Verdict:
        start = time.monotonic()
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            word = "ok" if jobs[name](Steps(log)) else "FAILED"
            log.seek(0)
            with printing:
                print(f"== {name}: {word}\n{log.read()}", flush=True)
        return Verdict(name, word, time.monotonic() - start)

    at_a_time = min(len(os.sched_getaffinity(0)), MAX_AT_A_TIME)
    with ThreadPoolExecutor(at_a_time) as pool:
        return list(pool.map(story, jobs))
