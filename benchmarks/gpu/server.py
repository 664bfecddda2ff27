"""A process that has imported torch and triton, and forks a child for each job.

Importing them takes up to twenty seconds; a fork takes milliseconds. The parent never touches CUDA,
which does not survive a fork: a child initialises it for itself. Requests are JSON lines on the
standard input, answers on the standard output. A child that runs past its limit is killed with its
process group, and so are all when the input ends.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.context import Context
from benchmarks.gpu.rows import ROWS_VARIABLE

PRELOADED = (
    "torch",
    "torch._dynamo",
    "torch._functorch.aot_autograd",
    "torch.distributed",
    "triton",
    "nanotron_fast.kernels.attention",
    "nanotron_fast.kernels.cross_entropy",
    "nanotron_fast.kernels.embedding",
    "nanotron_fast.kernels.glu",
    "nanotron_fast.kernels.linear_cross_entropy",
    "nanotron_fast.kernels.optimizer",
    "nanotron_fast.kernels.pack",
    "nanotron_fast.kernels.rms_norm",
    "nanotron_fast.kernels.rope",
    "nanotron_fast.parallel",
)
# Names, between spaces, that are imported in their place.
PRELOAD_VARIABLE = "NANOTRON_FAST_PRELOAD"
_PR_SET_PDEATHSIG = 1
# A process within a kernel that never ends may not even end when it is killed: after so long nobody
# waits for it any more.
_STUCK_SECONDS = 10.0


@dataclass
class Child:
    number: int
    started: float
    limit: float
    is_late: bool = False


def _answer(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)  # it had no time yet to begin a group of its own


def run_target(request: dict[str, Any]) -> None:
    """Calls a job's function: `module:function`, of benchmarks.gpu."""
    module, _, function = request["target"].partition(":")
    target = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
    target(request["operation"], request["variant"], Context(**request["context"]))


def _become(request: dict[str, Any]) -> None:
    """The child's life; does not return."""
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.environ.update(request["environment"], **{ROWS_VARIABLE: request["rows"]})
        if request["command"]:
            os.execvp(request["command"][0], request["command"])
        run_target(request)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fork(request: dict[str, Any], children: dict[int, Child]) -> None:
    pid = os.fork()
    if pid == 0:
        _become(request)
    children[pid] = Child(request["number"], time.monotonic(), request["limit"])


def _reap(children: dict[int, Child]) -> None:
    now = time.monotonic()
    for pid, child in list(children.items()):
        if now - child.started > child.limit and not child.is_late:
            child.is_late = True
            kill_group(pid)
        done, status = os.waitpid(pid, os.WNOHANG)
        is_stuck = child.is_late and now - child.started > child.limit + _STUCK_SECONDS
        if done or is_stuck:
            del children[pid]
            seconds = round(time.monotonic() - child.started, 3)
            code = os.waitstatus_to_exitcode(status) if done else -signal.SIGKILL
            _answer(number=child.number, code=code, is_late=child.is_late, seconds=seconds)


def serve() -> None:
    problems = {}
    for name in os.environ.get(PRELOAD_VARIABLE, "").split() or PRELOADED:
        try:
            importlib.import_module(name)
        except Exception:  # whoever needs it meets the same error, and reports it as its own
            problems[name] = traceback.format_exc(limit=-1)
    _answer(ready=True, problems=problems)
    children: dict[int, Child] = {}
    buffer = b""
    try:
        while True:
            readable, _, _ = select.select([0], [], [], 0.02 if children else 1.0)
            if readable:
                data = os.read(0, 1 << 16)
                if not data:
                    break
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    _fork(json.loads(line), children)
            _reap(children)
    finally:
        for pid in children:
            kill_group(pid)
