"""Runs a few tests with other versions of what we depend on than the tests are pinned to.

    python -m tests.versions [name ...]

Each line of TABLE gets an environment of its own, laid over the one that runs this: what it does
not install itself, torch above all, comes from there. Prints a table, and exits with 1 where a line
fails.
"""

from __future__ import annotations

import argparse
import site
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.side_by_side import Steps, run

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-versions"

ONE_CASE_EACH = ("tests/versions/one_case_each.py", "-q", "-p", "no:cacheprovider")
# The operations' main tests, interpreted; then every kernel compiled; then launches by Triton's
# own launcher.
KERNELS = (
    (
        *ONE_CASE_EACH,
        "tests/kernels",
        "-k",
        "matches_reference or test_accumulate or clip_is_that_of_torch or adamw_is_that_of_torch "
        "or transposed_matrices or casts_of_every_pattern or test_forward_and_backward "
        "or agree_with_the_reference",
    ),
    ("-m", "tests.versions.compile_one_each"),
    # Strides in tuples and bulk copies; lists of tensors; whole numbers and fractions.
    ("-m", "tests.kernels.launcher", "attention of whole heads", "adamw", "rope_normed"),
)
CONVERTER = (
    *ONE_CASE_EACH,
    "tests/checkpoints/test_roundtrip.py",
    "tests/checkpoints/test_golden.py",
    "tests/moves/test_casts.py",
    "tests/checkpoints/test_loading.py",
)
TRANSFORMERS = (
    (
        *ONE_CASE_EACH,
        "tests/checkpoints/test_roundtrip.py",
        "tests/checkpoints/test_golden.py",
        "tests/checkpoints/test_transformers.py",
        "tests/patch/test_transformers_models.py",
    ),
    # Of each family one model, there and back, with its logits and gradients.
    (*ONE_CASE_EACH, "tests/families/test_zoo.py", "tests/models/test_against_transformers.py"),
)
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
DATASETS = (*PYTEST, "tests/train/data/test_with_datasets.py")
COMMANDS = (*ONE_CASE_EACH, "tests/cli/test_cli.py", "tests/cli/test_usage.py")
TYPER = (
    *COMMANDS,
    "tests/cli/test_help.py",
    "tests/cli/test_flags.py",
    "tests/cli/test_completion.py",
)


@dataclass(frozen=True)
class Line:
    """An environment: what pip installs into it, and what its interpreter then runs."""

    name: str
    packages: tuple[str, ...]
    runs: tuple[tuple[str, ...], ...]
    needs_below: tuple[int, int] | None = None  # Python: later ones have no wheel of it

    @property
    def folder(self) -> Path:
        return FOLDER / self.name.replace(",", "").replace(" ", "-")


NUMPY_BEFORE_2_4 = (
    "numpy==2.2.6; python_version < '3.14'",
    "numpy==2.3.5; python_version >= '3.14'",
)
TABLES = ("pyarrow", "pandas", "xxhash")
TABLE = (
    # Its interpreter makes numbers of arrays of one element, which numpy refuses from 2.4 on.
    Line("triton 3.6", ("triton==3.6.0", *NUMPY_BEFORE_2_4), KERNELS),
    Line("triton 3.7", ("triton==3.7.1",), KERNELS),
    Line("triton 3.8", ("triton==3.8.0",), KERNELS),
    Line("triton 3.9", ("triton==3.9.0",), KERNELS),
    Line(
        "transformers 4.57",
        (
            "transformers==4.57.3",
            "huggingface_hub==0.36.2",
            "tokenizers==0.22.2",
            *("requests", "urllib3", "certifi", "charset-normalizer", "idna"),
        ),
        TRANSFORMERS,
    ),
    Line("transformers newest", ("transformers",), TRANSFORMERS),
    Line("numpy 1.26", ("numpy==1.26.4",), (CONVERTER,), needs_below=(3, 13)),
    Line("numpy newest", ("numpy",), (CONVERTER,)),
    # The oldest that the extra `train` takes, and what it needs that nothing else here does. Those
    # before pass by the links to files in a folder, and say nothing.
    Line(
        "datasets 3.3",
        ("datasets==3.3.0", "dill==0.3.8", "multiprocess==0.70.16", *TABLES, "requests"),
        (DATASETS,),
    ),
    Line("datasets newest", ("datasets", "dill", "multiprocess", *TABLES), (DATASETS,)),
    Line("typer 0.16", ("typer==0.16.0", "click==8.2.1"), (TYPER,)),
    # Which that typer gets where nothing else holds it back: the help of arguments is lost.
    Line("typer 0.16, newest click", ("typer==0.16.0", "click"), (COMMANDS,)),
    Line("typer newest", ("typer<0.29",), (TYPER,)),
)


def make(line: Line, steps: Steps) -> Path | None:
    """Gives the interpreter of a line's environment, with its packages installed."""
    python = line.folder / "bin" / "python"
    venv = (sys.executable, "-m", "venv", "--without-pip", line.folder)
    if not python.exists() and not steps.passes(*venv):
        return None
    own = next(line.folder.glob("lib/python3*/site-packages"))
    # Behind the environment's own packages, which come first in what modules are looked for in.
    shared = "; ".join(f"site.addsitedir({folder!r})" for folder in site.getsitepackages())
    (own / "development.pth").write_text(f"import site; {shared}\n")
    # --no-deps: the rest is there, and what must differ too is named. --no-compile: a few modules
    # of thousands are imported.
    options = ("-qq", "--no-deps", "--no-compile", "--ignore-installed", "--upgrade")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", *options)
    return python if steps.passes(*pip, *line.packages) else None


def job(line: Line) -> Callable[[Steps], bool]:
    """Sets a line's environment up and runs its tests, all of them whatever fails."""

    def passes(steps: Steps) -> bool:
        python = make(line, steps)
        if python is None:
            return False
        passed = [steps.passes(python, *each) for each in line.runs]
        return all(passed)

    return passes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="name", help="lines of the table; default: all")
    names = parser.parse_args().names
    unknown = set(names) - {line.name for line in TABLE}
    if unknown:
        parser.error(f"no such lines: {', '.join(sorted(unknown))}")
    lines = {line.name: line for line in TABLE if not names or line.name in names}
    left_out = [
        line
        for line in lines.values()
        if line.needs_below is not None and sys.version_info >= line.needs_below
    ]
    # The longest first, so that none begins when the others have nothing left.
    order = sorted(lines.values(), key=lambda line: line.runs != TRANSFORMERS)
    verdicts = run({line.name: job(line) for line in order if line not in left_out})
    for each in verdicts:
        packages = " ".join(lines[each.name].packages[:3])
        print(f"{each.name:<20} {packages:<70} {each.seconds:5.0f} s  {each.word}")
    for line in left_out:
        print(f"{line.name:<20} skipped: no wheel for this Python")
    failures = sum(each.word == "FAILED" for each in verdicts)
    print(f"{len(lines)} sets of versions, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
