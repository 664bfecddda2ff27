"""Kernels as they are compiled for a GPU give what they should, on the emulator of one.

`make emulate` runs all that there is to run there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which runs them"),
]
# A case of every operation, and products on tensor cores at odd sizes.
FILES = ("emulator", "emulator_ptx", "operations", "attention", "matmul")
CASES = "test_emulator or (test_operations and not compile) or matches_reference"


@pytest.mark.parametrize(
    ("options", "files", "num_tests"),
    [
        (("--arch", "80", "-k", CASES), FILES, 200),
        (("--arch", "90", "-k", CASES), FILES, 200),
        (("--arch", "90", "--profile"), ("accesses",), 9),
    ],
    ids=["sm_80", "sm_90", "accesses"],
)
def test_compiled_kernels(options: tuple[str, ...], files: tuple[str, ...], num_tests: int) -> None:
    under = (sys.executable, "-m", "tests.kernels.emulator", *options)
    result = subprocess.run(
        [
            *under,
            "-q",
            "-p",
            "no:cacheprovider",
            *(f"tests/kernels/test_{each}.py" for each in files),
        ],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) >= num_tests, result.stdout
