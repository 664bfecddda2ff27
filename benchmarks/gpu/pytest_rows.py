"""A pytest plugin: a row for each test that ran, and an end to those that hang.

    python -m pytest -p benchmarks.gpu.pytest_rows ...

A test past its limit is interrupted; one that does not even listen to that, within a kernel that
never ends, takes its process with it, and pytest-xdist starts another.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from benchmarks.gpu.jobs import TEST_SECONDS
from benchmarks.gpu.rows import ROWS_VARIABLE, emit

_GRACE_SECONDS = 10.0
_ERROR_CHARACTERS = 1000


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"the test took more than {TEST_SECONDS:.0f} s")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, TEST_SECONDS)
    faulthandler.dump_traceback_later(TEST_SECONDS + _GRACE_SECONDS, exit=True)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """With xdist, reports come to the process that started the workers, once each."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    if is_worker or ROWS_VARIABLE not in os.environ:
        return
    if report.when != "call" and report.passed:
        return
    row = {
        "kind": "test",
        "operation": report.nodeid.partition("::")[0].rpartition("/")[2].removesuffix(".py"),
        "variant": report.nodeid,
        "ok": None if report.skipped else report.passed,
        "seconds": round(report.duration, 3),
    }
    if report.failed:
        row["error"] = report.longreprtext[-_ERROR_CHARACTERS:]
    elif report.skipped and isinstance(report.longrepr, tuple):
        row["note"] = str(report.longrepr[2])
    emit(row)
