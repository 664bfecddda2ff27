"""Builds the package with every other Python that is here, and runs what needs no torch there.

    python -m tests.pythons [3.12 ...]

Each gets an environment of its own, with the converter's packages and pytest alone: numpy 1.26
on Python 3.10, the newest on the others. Prints a table, and exits with 1
where one fails. A Python that is not here is left out, and said to be.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-pythons"
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# The newest of each that pyproject.toml allows, but for numpy, whose oldest runs on 3.10.
PACKAGES = ("huggingface_hub", "pyyaml", "rich", "typer<0.29")
NUMPY = {"3.10": "numpy==1.26.4"}
# What builds, and what tests: as everywhere else.
TOOLS = ("setuptools", "pybind11", "ninja", "pytest", "hypothesis")
# A test of the files below that loads into memory, too.
WITH_TORCH = ("direction_does_not_look_at",)
# Run by its path: see there. One case of each test.
RUN = (
    *("tests/versions/one_case_each.py", "-q", "-p", "no:cacheprovider"),
    *("-k", f"not ({' or '.join(WITH_TORCH)})"),
)
TESTS = (
    "tests/checkpoints/plan/test_shards.py",
    "tests/checkpoints/test_config_written.py",
    "tests/checkpoints/test_golden.py",
    "tests/checkpoints/test_manifest.py",
    "tests/checkpoints/test_options.py",
    "tests/checkpoints/test_reshard.py",
    "tests/checkpoints/test_roundtrip.py",
    "tests/cli/test_cli.py",
    "tests/cli/test_flags.py",
    "tests/families/test_parts.py",
    "tests/families/test_refusals.py",
    "tests/formats/test_slices.py",
    "tests/hostile/test_headers.py",
    "tests/hostile/test_hf_folders.py",
    "tests/model/test_spec.py",
    "tests/moves/test_boxes.py",
    "tests/moves/test_cuts.py",
    "tests/moves/test_engine.py",
    "tests/moves/test_engine_errors.py",
    "tests/moves/test_groups.py",
    "tests/moves/test_hashing.py",
    "tests/moves/test_move_plan.py",
    "tests/moves/test_row.py",
    "tests/moves/test_shares.py",
)


def pythons(version: str) -> Iterator[Path]:
    """Where an interpreter of a version may be."""
    found = shutil.which(f"python{version}")
    if found is not None:
        yield Path(found)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for folder in sorted(pyenv.glob(f"versions/{version}.*"), reverse=True):
        yield folder / "bin" / "python"


PROBE = "import sys, venv, ensurepip; print('{}.{}'.format(*sys.version_info))"


def find(version: str) -> Path | None:
    """The first that runs: a shim of pyenv's may be there for a Python that is not chosen."""
    for path in pythons(version):
        if path.is_file():
            done = subprocess.run([path, "-c", PROBE], capture_output=True, text=True)
            if done.returncode == 0 and done.stdout.strip() == version:
                return path
    return None


def make(version: str, python: Path) -> Path:
    """Gives the interpreter of a version's environment, with this tree built into it."""
    folder = FOLDER / version
    own = folder / "bin" / "python"
    pip = [own, "-m", "pip", "install", "-qq"]
    if not own.exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
    packages = (*PACKAGES, NUMPY.get(version, "numpy"))
    subprocess.run([*pip, "-c", "constraints.txt", *TOOLS], cwd=ROOT, check=True)
    subprocess.run([*pip, "--upgrade", *packages], cwd=ROOT, check=True)
    # In place, as `make build` has it, whose objects are those of all that knows no Python.
    here = ["--no-build-isolation", "--no-deps", "-e", "."]
    environment = {"NANOTRON_FAST_CUDA": "0", **os.environ}
    subprocess.run([*pip, *here], cwd=ROOT, env=environment, check=True)
    subprocess.run([own, "-m", "pip", "check"], check=True, stdout=subprocess.DEVNULL)
    return own


def passes(version: str, python: Path) -> bool:
    """Builds, and runs the tests."""
    try:
        own = make(version, python)
    except subprocess.CalledProcessError as error:
        print(f"Python {version}: {error}", file=sys.stderr)
        return False
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([own, *RUN, *TESTS], cwd=ROOT, env=environment).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ours = "{}.{}".format(*sys.version_info)
    others = [version for version in VERSIONS if version != ours]
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of {', '.join(others)}")
    wanted = parser.parse_args().versions or others
    unknown = set(wanted) - set(VERSIONS)
    if unknown:
        parser.error(f"no such versions: {', '.join(sorted(unknown))}")
    rows = []
    for version in wanted:
        python = find(version)
        if python is None:
            rows.append((version, "is not here", 0.0))
            continue
        print(f"== Python {version}", flush=True)
        start = time.monotonic()
        verdict = "ok" if passes(version, python) else "FAILED"
        rows.append((version, verdict, time.monotonic() - start))
    print()
    for version, verdict, seconds in rows:
        print(f"Python {version:<6} {seconds:5.0f} s  {verdict}")
    failures = sum(verdict == "FAILED" for _, verdict, _ in rows)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
