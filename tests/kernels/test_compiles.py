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
CASES = HERE / "compiling"
MODULES = [info.name for info in pkgutil.iter_modules([str(CASES)]) if info.name[0] != "_"]


WITHOUT_GPU = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="compiles for all architectures, with our version of Triton: for machines without a GPU",
)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[str, list[str]]:
    """What is said of each module that a test here is about, the last line of all the count.

    From one process for all, which imports torch once; for here kernels are interpreted. Without
    --every-binary an autotuned launch has one of its configurations, and two launches of a kernel
    stand for all of them on sm_80 and sm_100.
    """
    brief = () if request.config.getoption("--every-binary") else ("--brief",)
    tests = [item for item in request.session.items if item.path == request.path]
    parameters = [item.callspec.params for item in tests if hasattr(item, "callspec")]
    wanted = {each.get("module", "rms_norm") for each in parameters}
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiling", *brief, *sorted(wanted)],
        cwd=HERE.parents[1],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    sections = (section.splitlines() for section in result.stdout.split("== ")[1:])
    found = {module: lines for module, *lines in sections}
    assert found.keys() == wanted, result.stderr
    return found


@pytest.mark.slow
@WITHOUT_GPU
@pytest.mark.parametrize("module", MODULES)
def test_compiles_without_spills(module: str, compiled: dict[str, list[str]]) -> None:
    *binaries, count = compiled[module]
    failures = [line for line in binaries if not line.startswith("ok ")]
    assert not failures, "\n".join(failures)
    assert count.endswith(" 0 failures")
    assert count == f"{len(binaries)} binaries of {count.split()[3]} launches, 0 failures"


@pytest.mark.slow
@WITHOUT_GPU
def test_candidates_compile_without_spills(request: pytest.FixtureRequest) -> None:
    """What a sweep times beside the rules: several binaries for each of theirs."""
    if not request.config.getoption("--every-binary"):
        pytest.skip("compiles hundreds of kernels: with --every-binary, which `make compile` gives")
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiling", "--candidates", "--arch", "90"],
        cwd=HERE.parents[1],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    failures = [line for line in result.stdout.splitlines() if line[:3] not in ("ok ", "== ")]
    failures = [line for line in failures if not line.endswith(" 0 failures")]
    assert result.returncode == 0, "\n".join(failures) + result.stderr
    assert re.search(r"^ok sm_90 .*gather_kernel.* COLS=2048,", result.stdout, re.M)


@pytest.mark.slow
@WITHOUT_GPU
@pytest.mark.parametrize(
    ("cols", "tensors", "copies"),
    [(4096, 2, 24), (4096, 3, 36), (16384, 2, 12), (16384, 3, 18), (2048, 2, 12), (2048, 3, 18)],
)
def test_the_norm_reads_ahead(
    cols: int,
    tensors: int,
    copies: int,
    compiled: dict[str, list[str]],
    request: pytest.FixtureRequest,
) -> None:
    """bf16 rows of 4096 over 128 threads: 4 copies of 16 bytes a tensor, 3 stages, no spill.

    Of 16384 over 1024 threads 2 copies, and of two rows of 2048 over 256 threads, the parts of rows
    that are wider. Two rows of 16384 of three tensors do not fit on sm_80, and without spills on
    sm_90 alone.
    """
    is_widest = (cols, tensors) == (16384, 3)
    lines = [
        line
        for line in compiled["rms_norm"]
        if ".backward_kernel[*bf16," in line
        and f" COLS={cols}," in line
        and " UNIT=8," in line
        and not (is_widest and line.split()[1] != "sm_90")
        and f"HAS_DH_OUT={tensors == 3}," in line
    ]
    architectures = {line.split()[1] for line in lines}
    assert "sm_90" in architectures
    if request.config.getoption("--every-binary") and not is_widest:
        assert architectures == {"sm_80", "sm_90", "sm_100"}
    for line in lines:
        assert f", {copies} copies " in line
        assert " spilled" not in line
        assert " STAGES=3," in line


@pytest.mark.slow
@WITHOUT_GPU
@pytest.mark.parametrize(
    ("module", "kernel", "most"),
    [("glu", "", 0), ("rms_norm", "", 512), ("embedding", r"\.join_kernel\b.*", 0)],
)
def test_short_accesses_of_a_kernel_have_one_layout(
    module: str, kernel: str, most: int, compiled: dict[str, list[str]]
) -> None:
    """Shared memory is there for the sums alone, of 16 rows over 8 warps or of one over 32."""
    pattern = re.compile(rf" (\d+) bytes shared.*{kernel} UNIT=[124],(?!.* STAGES=[23])")
    found = [match for line in compiled[module] if (match := pattern.search(line))]
    assert found
    for match in found:
        assert int(match[1]) <= most, match.string


@pytest.mark.slow
@WITHOUT_GPU
@pytest.mark.parametrize(
    ("module", "pattern", "accesses"),
    [
        # 50257 logits, whose rows begin anywhere, and the same in rows that are padded.
        ("cross_entropy", r"statistics_kernel\[\*bf16.*HAS_EDGES=True", "2 loads"),
        ("cross_entropy", r"gradient_kernel\[\*bf16.*HAS_EDGES=True", "4 loads, 4 stores"),
        ("linear_cross_entropy", r"statistics_kernel\[\*bf16.*HAS_EDGES=True", "2 loads"),
        ("linear_cross_entropy", r"gradient_kernel\[\*bf16.*HAS_EDGES=True", "4 loads, 4 stores"),
        # 1368 columns beside 14336, and 584 beside 576: multiples of 8, but not of 16.
        ("glu", r"_forward_kernel\[\*bf16.*silu, UNIT=8, ROWS=1, COLS=1024", "2 loads, 1 stores"),
        (
            "glu",
            r"kernel\[\*bf16.*HAS_H=False.*silu, UNIT=8, ROWS=1, COLS=1024",
            "3 loads, 2 stores",
        ),
        # Halves of heads, with three stages: gathered columns of W leave the tile side by side.
        (
            "matmul",
            r"sm_90 .*rope_kernel\[\*bf16.*INTERLEAVED=False.* BLOCK_M=128, BLOCK_N=256.*ages=3",
            "32 loads, 16 stores, 36 copies",
        ),
        # Three heads of 24: strides that are multiples of 8, but not of 16.
        (
            "rope",
            r"normed_kernels\.forward_kernel\[.* HEAD_DIM=24,.* Q_HEADS=4,",
            "3 loads, 2 stores",
        ),
        (
            "rms_norm",
            r"forward_kernel\[\*bf16.*RESIDUAL=False.* UNIT=8, ROWS=4",
            "2 loads, 2 stores",
        ),
        ("rms_norm", r"by_parts_kernel\[\*bf16.*RESIDUAL=True.* UNIT=8", "4 loads, 2 stores"),
        ("rms_norm", r"means_kernel\[\*bf16.* UNIT=8", "3 loads"),
    ],
)
def test_odd_widths_are_read_16_bytes_at_a_time(
    module: str, pattern: str, accesses: str, compiled: dict[str, list[str]]
) -> None:
    """In instructions of a thread."""
    lines = [line for line in compiled[module] if re.search(pattern, line)]
    assert lines
    for line in lines:
        assert f" bytes shared, {accesses} " in line


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
