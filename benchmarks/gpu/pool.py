"""The runner's side of the processes that jobs run in."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.jobs import Job
from benchmarks.gpu.rows import Row, Tail

ENTRY = Path(__file__).parents[1] / "run_gpu.py"
# What a failure may bring along of its log.
_ERROR_LINES, _ERROR_CHARACTERS = 12, 1500


@dataclass
class Running:
    """A job in a process, or the end of one: `code` is None until then."""

    job: Job
    rows: Tail
    log: Path
    limit: float
    code: int | None = None
    is_late: bool = False
    seconds: float = 0.0

    @property
    def error(self) -> str:
        """Why it failed: the cause, then the end of its log; empty where it did not."""
        if self.code == 0:
            return ""
        if self.is_late:
            cause = f"killed after its limit of {self.limit:.0f} s"
        elif self.code is None:
            cause = "cut off with the run"
        elif self.code < 0:
            cause = f"killed by {signal.Signals(-self.code).name}"
        else:
            cause = f"exit code {self.code}"
        return f"{cause}\n{log_end(self.log)}".strip()


def log_end(path: Path) -> str:
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-_ERROR_LINES:])[-_ERROR_CHARACTERS:]


class Pool:
    """Starts jobs through the fork server, and says when they end.

    A server that dies is started again; what it was running has failed.
    """

    def __init__(self, scratch: Path, environment: dict[str, str]) -> None:
        self.scratch, self.environment = scratch, environment
        self.running: dict[int, Running] = {}
        self.problems: dict[str, str] = {}
        self._numbers = itertools.count()
        self._start_server()

    def _start_server(self) -> None:
        self._log = self.scratch / "server.log"
        self._server = subprocess.Popen(
            [sys.executable, str(ENTRY), "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("wb"),
            env=os.environ | self.environment,
            cwd=ENTRY.parents[1],
            # A signal for the runner's group is the runner's to handle.
            start_new_session=True,
        )
        self._buffer, self._is_ready = b"", False

    def start(self, job: Job, limit: float, context: dict[str, Any]) -> None:
        number = next(self._numbers)
        path = self.scratch / f"{number}"
        running = Running(job, Tail(path.with_suffix(".jsonl")), path.with_suffix(".log"), limit)
        request = {
            "number": number,
            "operation": job.operation,
            "variant": job.variant,
            "target": job.target,
            "command": list(job.command),
            "environment": dict(job.environment),
            "limit": limit,
            "context": context,
            "rows": str(running.rows.path),
            "log": str(running.log),
        }
        self.running[number] = running
        assert self._server.stdin is not None
        try:
            self._server.stdin.write((json.dumps(request) + "\n").encode())
            self._server.stdin.flush()
        except BrokenPipeError:
            pass  # poll() sees the end of its output, and starts another

    def poll(self, seconds: float) -> list[tuple[Running, list[Row]]]:
        """Waits a little, then gives the rows that came in; `code` is set of those that ended."""
        assert self._server.stdout is not None
        ended: list[Running] = []
        readable, _, _ = select.select([self._server.stdout], [], [], seconds)
        if readable:
            data = os.read(self._server.stdout.fileno(), 1 << 16)
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for answer in map(json.loads, lines):
                if "ready" in answer:
                    self.problems, self._is_ready = answer["problems"], True
                    continue
                running = self.running.pop(answer["number"])
                running.code, running.is_late = answer["code"], answer["is_late"]
                running.seconds = answer["seconds"]
                ended.append(running)
            if not data:
                ended += self._replace_server()
        return [(each, each.rows()) for each in (*ended, *self.running.values())]

    def _replace_server(self) -> list[Running]:
        code = self._server.wait()
        if not self._is_ready:
            raise RuntimeError(f"the process that forks ended with {code}: {log_end(self._log)}")
        lost, self.running = list(self.running.values()), {}
        sys.stderr.write(log_end(self._log) + "\n")
        for running in lost:
            running.code = code or 1
            running.log.write_text(f"the process that forks ended with {code}\n")
        self._start_server()
        return lost

    def stop(self) -> None:
        """Ends everything that still runs."""
        assert self._server.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._server.stdin.close()
        try:
            self._server.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
