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
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock

from tests.side_by_side import Steps, run

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-pythons"
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# The newest of each that pyproject.toml allows, but for numpy, whose oldest runs on 3.10.
PACKAGES = ("huggingface_hub", "pyyaml", "rich", "typer<0.29")
NUMPY = {"3.10": "numpy==1.26.4"}
# What builds, and what tests: as everywhere else.
TOOLS = ("setuptools", "pybind11", "ninja", "pytest", "hypothesis")
CUDA = os.environ.get("NANOTRON_FAST_CUDA", "0")
# Builds share the objects of what knows no Python, and what ninja notes of them.
BUILDING = Lock()
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


def make(version: str, python: Path, steps: Steps) -> Path | None:
    """Gives the interpreter of a version's environment, with this tree built into it."""
    folder = FOLDER / version
    own = folder / "bin" / "python"
    if not own.exists() and not steps.passes(python, "-m", "venv", "--without-pip", folder):
        return None
    # Of our own pip. --no-compile: most modules of what is installed are never imported.
    pip = (sys.executable, "-m", "pip", "--python", own)
    install = (*pip, "install", "-qq", "--no-compile")
    packages = (*PACKAGES, NUMPY.get(version, "numpy"))
    # In place, as `make build` has it, whose objects are those of all that knows no Python.
    here = ("--no-build-isolation", "--no-deps", "-e", ".")
    if not (
        steps.passes(*install, "-c", "constraints.txt", *TOOLS)
        and steps.passes(*install, "--upgrade", *packages)
    ):
        return None
    with BUILDING:
        if not steps.passes(*install, *here, NANOTRON_FAST_CUDA=CUDA):
            return None
    return own if steps.passes(*pip, "check") else None


def job(version: str, python: Path) -> Callable[[Steps], bool]:
    """Builds, and runs the tests."""

    def passes(steps: Steps) -> bool:
        own = make(version, python, steps)
        return own is not None and steps.passes(own, *RUN, *TESTS)

    return passes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ours = "{}.{}".format(*sys.version_info)
    others = [version for version in VERSIONS if version != ours]
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of {', '.join(others)}")
    wanted = parser.parse_args().versions or others
    unknown = set(wanted) - set(VERSIONS)
    if unknown:
        parser.error(f"no such versions: {', '.join(sorted(unknown))}")
    found = {version: find(version) for version in wanted}
    jobs = {
        f"Python {version}": job(version, python)
        for version, python in found.items()
        if python is not None
    }
    verdicts = run(jobs)
    for each in verdicts:
        print(f"{each.name:<12} {each.seconds:5.0f} s  {each.word}")
    for version, python in found.items():
        if python is None:
            print(f"Python {version} is not here")
    return 1 if any(each.word == "FAILED" for each in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
