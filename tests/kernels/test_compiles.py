"""Every kernel compiles for every architecture, and keeps its values in registers."""

from __future__ import annotations

import functools
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CASES = HERE / "compiling"
MODULES = [info.name for info in pkgutil.iter_modules([str(CASES)]) if info.name[0] != "_"]


WITHOUT_GPU = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="compiles for all architectures, with our version of Triton: for machines without a GPU",
)


@functools.cache
def compiling(module: str) -> subprocess.CompletedProcess[str]:
    """What compiling a module's launches says, in a process where kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiling", module],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@WITHOUT_GPU
@pytest.mark.parametrize("module", MODULES)
def test_compiles_without_spills(module: str) -> None:
    result = compiling(module)
    failures = [line for line in result.stdout.splitlines() if not line.startswith("ok ")]
    assert result.returncode == 0, "\n".join(failures) + result.stderr
    assert " 0 failures" in failures[-1]


@pytest.mark.slow
@WITHOUT_GPU
@pytest.mark.parametrize(("tensors", "copies"), [(2, 24), (3, 36)])
def test_the_norm_reads_ahead(tensors: int, copies: int) -> None:
    """bf16 rows of 4096 over 128 threads: 4 copies of 16 bytes a tensor, 3 stages, no spill."""
    lines = [
        line
        for line in compiling("rms_norm").stdout.splitlines()
        if "_backward_kernel[*bf16," in line
        and " COLS=4096," in line
        and f"HAS_DH_OUT={tensors == 3}," in line
    ]
    assert [line.split()[1] for line in lines] == ["sm_80", "sm_90", "sm_100"]
    for line in lines:
        assert f", {copies} copies " in line
        assert " spilled" not in line
        assert " STAGES=3," in line


def test_every_file_with_kernels_is_compiled() -> None:
    folder = HERE.parents[1] / "kernels"
    kernels = {
        ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        for path in folder.rglob("*.py")
        if re.search(r"^def \w+_kernel\(", path.read_text(), re.M)
    }
    covered = set()
    for module in MODULES:
        line = re.search(r"^FILES = \((.*?)\)$", (CASES / f"{module}.py").read_text(), re.M)
        covered |= set(re.findall(r'"([\w.]+)"', line[1]))
    assert kernels
    assert kernels == covered
