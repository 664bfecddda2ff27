"""Feeds random input to everything that reads what others wrote.

    python -m tests.fuzz [--seconds N] [--target NAME] [--plain]

Each target runs in a process of its own, with atheris (libFuzzer) where it is installed, with
mutations of our own where not. Finds go to build/fuzz/, one file each; those that are mended belong
into tests/hostile/corpus/. Exits with 1 at a find.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time

from tests.fuzz import FOUND, ROOT

STARTING_SECONDS = 120


def main() -> int:
    """Runs every target, and says a line of each."""
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=int, default=300, help="for all targets together")
    parser.add_argument("--target", choices=[*TARGETS], help="one of them alone")
    parser.add_argument("--plain", action="store_true", help="without atheris")
    given = parser.parse_args()
    names = [given.target] if given.target else [*TARGETS]
    is_plain = given.plain or importlib.util.find_spec("atheris") is None
    if is_plain:
        print("atheris is not used: mutations of our own, which no coverage guides", flush=True)
    FOUND.mkdir(parents=True, exist_ok=True)
    failed = [
        name for name in names if not _run(name, max(1, given.seconds // len(names)), is_plain)
    ]
    if failed:
        print(f"finds in {', '.join(failed)}: see {FOUND}")
    return bool(failed)


def _run(name: str, seconds: int, is_plain: bool) -> bool:
    """One target in a process of its own; whether all went well."""
    before = set(FOUND.glob(f"{name}-*"))
    log = FOUND / f"{name}.log"
    command = [sys.executable, "-m", "tests.fuzz.process", name, str(seconds)]
    start = time.monotonic()
    with log.open("wb") as file:
        try:
            code = subprocess.run(
                [*command, *(["--plain"] if is_plain else [])],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                check=False,
                timeout=seconds + STARTING_SECONDS,
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    finds = sorted(path.name for path in set(FOUND.glob(f"{name}-*")) - before)
    inputs = [line for line in log.read_text(errors="replace").splitlines() if "inputs" in line]
    took = time.monotonic() - start
    how = "no finds" if code == 0 else f"exit code {code}, {', '.join(finds) or 'no input kept'}"
    print(f"{name:20} {took:4.0f} s  {how}; {inputs[-1] if inputs else f'see {log}'}", flush=True)
    return code == 0


if __name__ == "__main__":
    sys.exit(main())
