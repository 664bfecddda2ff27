"""Every kernel compiles for every architecture, and keeps its values in registers."""

from __future__ import annotations

import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
MODULES = [info.name for info in pkgutil.iter_modules([str(HERE / "gate")]) if info.name[0] != "_"]


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="compiles for all architectures, with our version of Triton: for machines without a GPU",
)
@pytest.mark.parametrize("module", MODULES)
def test_compiles_without_spills(module: str) -> None:
    # A process of its own: in this one the kernels may be interpreted.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.gate", module],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    failures = [line for line in result.stdout.splitlines() if not line.startswith("ok ")]
    assert result.returncode == 0, "\n".join(failures) + result.stderr
    assert " 0 failures" in failures[-1]


def test_every_file_with_kernels_is_compiled() -> None:
    folder = HERE.parents[1] / "kernels"
    kernels = {
        ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        for path in folder.rglob("*.py")
        if re.search(r"^def \w+_kernel\(", path.read_text(), re.M)
    }
    covered = set()
    for module in MODULES:
        line = re.search(r"^FILES = \((.*?)\)$", (HERE / "gate" / f"{module}.py").read_text(), re.M)
        covered |= set(re.findall(r'"([\w.]+)"', line[1]))
    assert kernels
    assert kernels == covered
