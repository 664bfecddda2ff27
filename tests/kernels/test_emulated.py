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
FILES = ("emulator", "operations", "attention", "matmul")
CASES = "test_emulator or (test_operations and not compile) or matches_reference"


@pytest.mark.parametrize("architecture", [80, 90])
def test_compiled_kernels(architecture: int) -> None:
    files = [f"tests/kernels/test_{name}.py" for name in FILES]
    under = (sys.executable, "-m", "tests.kernels.emulator", "--arch", str(architecture))
    result = subprocess.run(
        [*under, "-q", "-p", "no:cacheprovider", "-k", CASES, *files],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) >= 100, result.stdout
