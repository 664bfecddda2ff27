"""Processes that begin with torch imported: forked, in milliseconds, from one that imported it.

Importing torch and Triton takes seconds, and several ranks on few cores take turns at it. What is
run is a module or a script as `python` would run it, with an environment and streams of its own.
Here is both the client, `run`, and the process that forks, `python -m tests.forks`. That one reads
requests from its standard input, one JSON line for each group of processes, and answers with their
exit codes. It ends when its input does.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).parents[1]
# torch._dynamo: whoever calls a custom operator or a collective imports it, if he compiles or not.
PRELOADED = ("torch", "torch.distributed", "torch._dynamo", "triton", "triton.language", "numpy")


class Result(NamedTuple):
    """What a process left: its exit code, or the negative of the signal that ended it."""

    code: int
    out: str
    err: str


def run(
    words: Sequence[object],
    environments: Sequence[Mapping[str, str]],
    folder: Path,
    timeout_seconds: float,
) -> list[Result]:
    """Runs `python words...` in as many processes at once as there are environments.

    Args:
        words: `-m`, a module and its arguments, or the path of a script and its arguments.
        environments: what each process has beside this one's variables. What is read when torch or
            Triton is imported is as it was when the first of these processes was asked for.
        folder: where their output is kept until it is read.
        timeout_seconds: they are killed after it.
    """
    request = {
        "words": [str(word) for word in words],
        "environments": [{**os.environ, **environment} for environment in environments],
        "folder": str(folder),
        "timeout_seconds": timeout_seconds,
    }
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, f"the process that forks has ended with {server.wait()}"
    results = []
    for number, code in enumerate(json.loads(answer)):
        out, err = _streams(folder, number)
        results.append(Result(code, out.read_text(), err.read_text()))
    return results


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.forks"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait()


def _streams(folder: str | Path, number: int) -> tuple[Path, Path]:
    return Path(folder, f"{number}.out"), Path(folder, f"{number}.err")


def serve() -> None:
    """Answers requests until there are no more."""
    for name in PRELOADED:
        importlib.import_module(name)
    if "EMULATOR_ARCH" in os.environ:
        importlib.import_module("tests.kernels.emulator.plugin").set_up()
    for line in sys.stdin:
        request = json.loads(line)
        pids: list[int] = []
        for number, environment in enumerate(request["environments"]):
            pid = os.fork()
            if pid == 0:
                _live(request, number, environment)
            pids.append(pid)
        print(json.dumps(_codes(pids, request["timeout_seconds"])), flush=True)
    os._exit(0)


def _live(request: dict[str, Any], number: int, environment: dict[str, str]) -> NoReturn:
    """A forked process from its beginning to its end."""
    os.environ.clear()
    os.environ.update(environment)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for descriptor, path in enumerate(_streams(request["folder"], number), start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    code = 0
    try:
        _run(request["words"])
    except SystemExit as ended:
        code = _code_of(ended)
    except BaseException:
        traceback.print_exc()
        code = 1
    # As the interpreter ends, but for taking torch's modules apart: that takes 1.4 s.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    os._exit(code)


def _code_of(ended: SystemExit) -> int:
    if ended.code is None or isinstance(ended.code, int):
        return ended.code or 0
    print(ended.code, file=sys.stderr)
    return 1


def _run(words: Sequence[str]) -> None:
    """Runs what `python words...` would."""
    first, *rest = words
    if first == "-m":
        module, *rest = rest
        sys.argv = [module, *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path[0] = str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


def _codes(pids: Sequence[int], timeout_seconds: float) -> list[int]:
    """Exit codes of processes, all of which have ended then."""
    deadline = time.monotonic() + timeout_seconds
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    serve()
