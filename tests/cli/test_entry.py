"""How the command ends: signals, streams that cannot be written to, faults of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nanotron_fast
from nanotron_fast import interruption
from nanotron_fast.errors import one_line
from nanotron_fast.interruption import Interrupted
from tests.checkpoints.test_processes import free_port

MODULE = [sys.executable, "-m", "nanotron_fast"]
SCRIPT = Path(__file__).parents[2] / "examples" / "llama" / "convert_hf_to_nanotron.py"
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
# The command, with something changed in it first.
CHANGED = """
import os, signal, sys, time
from nanotron_fast.__main__ import main
{change}
sys.argv[0] = "nanotron-fast"
main()
"""
AT_IMPORT = """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
"""
# Before a file is whole.
AT_WORK = """
from nanotron_fast.checkpoints import carrying_out as conversion
execute = conversion.engine.execute
def interrupted(*args, **kwargs):
    os.kill(os.getpid(), {number})
    execute(*args, **kwargs)
conversion.engine.execute = interrupted
"""
# The second signal, as torchrun sends one, comes while the first is being answered.
TWICE = """
from nanotron_fast.checkpoints import destination
remove = destination.remove
def removed(path):
    os.kill(os.getpid(), signal.SIGTERM)
    remove(path)
destination.remove = removed
"""
# When all of them are.
WHEN_WRITTEN = """
from nanotron_fast.checkpoints import carrying_out as conversion
execute = conversion.engine.execute
def interrupted(*args, **kwargs):
    execute(*args, **kwargs)
    os.kill(os.getpid(), {number})
conversion.engine.execute = interrupted
"""
AT_THE_END = """
from nanotron_fast.checkpoints import placing
rename = placing.rename_to_free
def kill(one, other):
    os.kill(os.getpid(), {number})
    rename(one, other)
placing.rename_to_free = kill
"""
FAULT = """
from nanotron_fast.checkpoints import verify as verification
def fault(*args, **kwargs):
    raise {error}
verification.verify = fault
"""
# Process 0 waits for process 1, in native code; process 1 works until it is told to stop.
RANKS = """
from nanotron_fast.checkpoints import carrying_out as conversion
from nanotron_fast.checkpoints.processes import TorchProcesses
execute = conversion.engine.execute
def slow(*args, **kwargs):
    if os.environ["RANK"] == "1":
        time.sleep(60)
    execute(*args, **kwargs)
    print("waits", flush=True)
conversion.engine.execute = slow
"""


def start(change: str, *words: object, **options: object) -> subprocess.Popen[str]:
    environment = {**os.environ, **options.pop("env", {})}  # type: ignore[dict-item]
    path = os.pathsep.join(each for each in sys.path if each)
    return subprocess.Popen(
        [sys.executable, "-c", CHANGED.format(change=change), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "PYTHONPATH": path},
    )


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_while_the_command_is_imported(number: int, code: int) -> None:
    process = start(AT_IMPORT.format(number=int(number)), "inspect", "nothing")
    out, err = process.communicate(timeout=60)
    name = signal.Signals(number).name
    assert (process.returncode, out) == (code, "")
    assert err == f"interrupted by {name}: nothing was written\n"


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("is_there", [False, True])
def test_a_signal_at_work(
    is_there: bool, number: int, code: int, tmp_path: Path, golden_hf: Path
) -> None:
    out = tmp_path / "new" / "out"
    if is_there:
        out.mkdir(parents=True)
    change = AT_WORK.format(number=int(number)) + TWICE
    process = start(change, "convert", golden_hf, out)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err == f"interrupted by {signal.Signals(number).name}: {out} is as it was\n"
    assert names(tmp_path) == (["new"] if is_there else [])
    assert not is_there or names(out) == []


@pytest.mark.parametrize("is_there", [False, True])
def test_a_signal_when_files_are_whole(is_there: bool, tmp_path: Path, golden_hf: Path) -> None:
    """They stay, and the line says how to go on with them."""
    out = tmp_path / "out"
    if is_there:
        out.mkdir()
    process = start(WHEN_WRITTEN.format(number=15), "convert", golden_hf, out)
    _, err = process.communicate(timeout=60)
    (left,) = out.iterdir() if is_there else tmp_path.iterdir()
    assert (process.returncode, err) == (
        143,
        f"interrupted by SIGTERM: {out} is as it was, and 27 of 27 files are whole in {left}: "
        "--resume goes on with them, --overwrite-partial begins anew\n",
    )
    report = nanotron_fast.convert(golden_hf, out, resume=True)
    assert not report.part.outputs
    assert nanotron_fast.verify(golden_hf, out).equal
    assert names(tmp_path) == ["out"]


def test_a_signal_at_the_last_step(tmp_path: Path, golden_hf: Path) -> None:
    """The result is there, and the line says so."""
    out = tmp_path / "out"
    process = start(AT_THE_END.format(number=15), "convert", golden_hf, out)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (143, f"interrupted by SIGTERM: {out} is whole\n")
    assert nanotron_fast.verify(golden_hf, out).equal
    assert names(tmp_path) == ["out"]


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path, golden_hf: Path) -> None:
    """As nohup has it."""
    change = f"signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{AT_WORK.format(number=1)}"
    process = start(change, "convert", golden_hf, tmp_path / "out")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


def test_processes_end_though_the_others_do_not_come(tmp_path: Path, golden_hf: Path) -> None:
    port = str(free_port())
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    first, second = (
        start(
            RANKS,
            "convert",
            golden_hf,
            tmp_path / "out",
            env={**world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "waits\n"
    first.send_signal(signal.SIGTERM)
    started = time.monotonic()
    _, err = first.communicate(timeout=60)
    assert time.monotonic() - started < 10
    assert first.returncode == 143
    assert f"interrupted by SIGTERM: {tmp_path / 'out'} is as it was" in err
    second.send_signal(signal.SIGTERM)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 143
    assert "interrupted by SIGTERM: process 1 has ended" in err
    nanotron_fast.convert(golden_hf, tmp_path / "out", resume=True)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "redirection", ["2>&-", ">&-", ">/dev/full 2>/dev/full", "0<&- >&- 2>&-", "| true", "2>&1 | :"]
)
def test_streams_that_cannot_be_written_to(
    redirection: str, tmp_path: Path, golden_hf: Path
) -> None:
    """The exit code speaks of the work alone, and the result is whole."""
    run = " ".join([*MODULE, "convert", str(golden_hf), str(tmp_path / "out"), "--json"])
    result = subprocess.run(
        ["bash", "-c", f"{run} {redirection}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert nanotron_fast.verify(golden_hf, tmp_path / "out").equal
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["verify", "HF", "HF"], 0),
        (["verify", "HF", "OTHER", "--json"], 1),
        (["inspect", "HF"], 0),
        (["convert", "HF", "OUT", "--dry-run"], 0),
        (["inspect", "nothing/at/all"], 2),
        (["--help"], 0),
    ],
    ids=str,
)
def test_a_full_device(
    words: list[str], code: int, tmp_path: Path, golden: Path, golden_hf: Path
) -> None:
    places = {
        "HF": str(golden_hf),
        "OTHER": str(golden / "qwen2" / "hf"),
        "OUT": str(tmp_path / "out"),
    }
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*MODULE, *(places.get(word, word) for word in words)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == code
    assert (code == 2) != (
        result.stderr == "warning: stdout cannot be written to: No space left on device\n"
    )


def test_the_scripts_of_nanotron_end_likewise(tmp_path: Path, golden_hf: Path) -> None:
    out = tmp_path / "out"
    run = f"{sys.executable} {SCRIPT} --checkpoint_path={golden_hf} --save_path={out}"
    result = subprocess.run(["bash", "-c", f"{run} >/dev/full 2>&-"], check=False)
    assert result.returncode == 0
    assert nanotron_fast.verify(golden_hf, out).equal


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        ("RuntimeError('odd')", 70, "RuntimeError: odd"),
        ("MemoryError()", 2, "error: there is not enough memory"),
    ],
)
def test_a_fault_is_no_difference(error: str, code: int, message: str, golden_hf: Path) -> None:
    """Exit code 1 of `verify` says that something differs."""
    process = start(FAULT.format(error=error), "verify", golden_hf, golden_hf)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.splitlines()[-1] == message


@pytest.mark.parametrize("is_ours", [True, False])
def test_an_error_ends_what_we_have_connected_at_once(is_ours: bool) -> None:
    """Gloo's threads may abort a process that ends in order, and its exit code is lost then.

    What a script has connected ends in order: its trackers may have something to send.
    """
    change = f"""
import atexit
import torch.distributed as dist
from nanotron_fast.checkpoints import processes
connect = processes.join if {is_ours} else dist.init_process_group
atexit.register(print, "in order")
"""
    # As torchrun's ranks are connected, within the command.
    works = """
from nanotron_fast.cli import commands
def fails(*_, **__):
    connect("gloo")
    raise SystemExit(3)
commands.app = fails
"""
    world = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    env = {**world, "MASTER_PORT": str(free_port())}
    process = start(change + works, "inspect", "nothing", env=env)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (3, "" if is_ours else "in order\n", "")


def test_a_signal_waits_for_the_end_of_what_is_held() -> None:
    before = signal.getsignal(signal.SIGTERM)
    interruption.install()
    done: list[str] = []

    def work() -> None:
        with interruption.held():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("all")

    def clean_up() -> None:
        with interruption.ending():
            os.kill(os.getpid(), signal.SIGTERM)
            with interruption.held():
                done.append("cleaned")

    try:
        with pytest.raises(Interrupted, match="SIGTERM"):
            work()
        clean_up()
    finally:
        interruption.restore()
    assert done == ["all", "cleaned"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_within_a_wait_is_no_other_error() -> None:
    """Between a lock that is let go and one that is taken it would become a RuntimeError."""
    program = """
import os, signal, threading
from nanotron_fast import interruption
interruption.install()

class Condition(threading.Condition):
    def wait(self, timeout=None):
        self.release()
        os.kill(os.getpid(), signal.SIGTERM)
        self.acquire()
        return False

event = threading.Event()
event._cond = Condition(threading.Lock())
try:
    interruption.wait(event, 0.01)
except interruption.Interrupted:
    print("interrupted")
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
    assert result.stdout == "interrupted\n"


def test_a_signal_while_a_thread_starts_is_no_other_error() -> None:
    """So in whatever waits in the standard library's modules for threads."""
    program = """
import signal, threading, time
from nanotron_fast import interruption
interruption.install()
code = "def wait(self, timeout=None):\\n"
for line in ("self.release()", "signal.raise_signal(15)", "self.acquire()", "return True"):
    code += f" {line}\\n"
found = {}
exec(code, {"__name__": "threading", "signal": signal}, found)
threading.Condition.wait = found["wait"]
try:
    threading.Thread(target=int).start()
    time.sleep(30)
except interruption.Interrupted:
    print("interrupted")
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, check=False, timeout=60, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("interrupted\n", "")


def test_a_signal_ends_a_wait_of_a_library_too() -> None:
    program = """
import signal, threading
from nanotron_fast import interruption
interruption.install(signal.SIGALRM)
signal.setitimer(signal.ITIMER_REAL, 0.1)
try:
    threading.Event().wait(30)
except interruption.Interrupted:
    print("interrupted")
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, check=False, timeout=10, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("interrupted\n", "")


def test_a_signal_is_the_main_threads_whatever_another_one_holds() -> None:
    """As one that writes a checkpoint does, which it would end on this process alone."""
    program = """
import os, signal, threading, time
from nanotron_fast import interruption
interruption.install()
found = []

def work(holding):
    try:
        with holding():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)  # the main thread answers meanwhile
    except BaseException as error:
        found.append(error)

for holding in (interruption.held, interruption.ending):
    thread = threading.Thread(target=work, args=(holding,))
    try:
        thread.start()
        time.sleep(30)
    except interruption.Interrupted:
        print("interrupted", thread.is_alive())
    thread.join()
print(found)
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, check=False, timeout=90, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("interrupted True\n" * 2 + "[]\n", "")


def test_what_the_system_says_comes_after_the_file() -> None:
    full = "No space left on device"
    for given, told in {
        (28, full): full,
        (28, full, "a\nb"): f"a\\nb: {full}",
        (18, "Invalid cross-device link", "a", None, "b"): "a -> b: Invalid cross-device link",
        ("it is full",): "it is full",
    }.items():
        assert one_line(OSError(*given)) == told


@pytest.mark.parametrize(
    "words",
    [
        "train URL",
        "plot URL",
        f"tokenize {__file__} URL --tokenizer gpt2",
        "tokenize URL out --tokenizer gpt2",
        "generate URL --prompt hello",
    ],
)
def test_urls_are_refused_where_none_is_taken(words: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = words.replace("URL", "s3://me:secret@bucket/x").split()
    ended = subprocess.run([*MODULE, *given], capture_output=True, text=True)
    assert ended.returncode == 2
    said = "error: s3://me@bucket/x: convert, verify and inspect work with URLs"
    assert ended.stderr.startswith(said)
    assert not list(tmp_path.iterdir())
