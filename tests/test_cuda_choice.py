"""Whether a build makes the packer for GPUs, and for which: with compilers and GPUs of paper."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parents[1]
KNOWN = (75, 80, 86, 90, 100)


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_cuda", ROOT / "setup_cuda.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda_choice = load()


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def make_cuda(home: Path, known: tuple[int, ...] = KNOWN) -> None:
    """A CUDA compiler that can say what it knows, and nothing else."""
    lines = "; ".join(f"echo compute_{each}" for each in known) or ":"
    script(home / "bin" / "nvcc", f'case "$1" in --list-gpu-arch) {lines};; esac')
    (home / "lib64").mkdir()
    (home / "lib64" / "libcudart_static.a").touch()


GpuMaker = Callable[[str], None]


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GpuMaker:
    """Makes an nvidia-smi that prints a text; without a call there is none, and no driver."""
    for name in (cuda_choice.WISH, cuda_choice.LIST):
        monkeypatch.delenv(name, raising=False)
    make_cuda(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(cuda_choice, "driver_architectures", list)
    wanted = " ".join(cuda_choice.NVIDIA_SMI[1:])

    def make(text: str) -> None:
        answer = f'[ "$*" = "{wanted}" ] || exit 1\nprintf "{text}"'
        script(tmp_path / "bin" / "nvidia-smi", answer)

    return make


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("9.0\\n", [90]),
        ("9.0\\n8.0\\n9.0\\n", [80, 90]),
        ("12.0\\n", [100]),  # newer than the compiler: the newest that it knows
        ("8.9\\n", [86]),
        ("7.0\\n9.0\\n", [90]),
    ],
)
def test_compiled_for_the_gpus_that_are_here(
    printed: str, expected: list[int], gpus: GpuMaker
) -> None:
    gpus(printed)
    cuda, line = cuda_choice.find_cuda()
    assert cuda.architectures == expected
    assert f"is built for {cuda_choice.names(expected)} (the GPU here is sm_" in line
    assert "NANOTRON_FAST_CUDA=0 leaves it out" in line


@pytest.mark.parametrize(
    "text", ["80;90;100", "80,90,100", "100 90 80", " 8.0; 9.0,10.0 ", "80;80;90;100"]
)
def test_a_list_comes_before_the_gpus(
    text: str, gpus: GpuMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus("8.6\\n")
    monkeypatch.setenv("NANOTRON_FAST_CUDA_ARCHS", text)
    cuda, line = cuda_choice.find_cuda()
    assert cuda.architectures == [80, 90, 100]
    assert "is built for sm_80, sm_90, sm_100 (as NANOTRON_FAST_CUDA_ARCHS says)" in line


def test_what_nvcc_is_told(gpus: GpuMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code for each, and the newest's PTX for GPUs that come later."""
    monkeypatch.setenv("NANOTRON_FAST_CUDA_ARCHS", "90,80")
    cuda, _ = cuda_choice.find_cuda()
    command = cuda.compile_command(["c++"], ["-Wall"])
    targets = [word for before, word in pairwise(command) if before == "-gencode"]
    assert targets == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90,code=sm_90",
        "arch=compute_90,code=compute_90",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("90a", "ARCHS=90a: '90a' is no architecture; name them by number, with ; between: 80;"),
        ("80;;sm_90", "'sm_90' is no architecture"),
        ("hopper", "'hopper' is no architecture"),
        ("9", "'9' is no architecture"),
        ("native", "'native' is no architecture"),
        ("80;110", "nvcc does not know sm_110, only sm_75, sm_80, sm_86, sm_90, sm_100"),
    ],
)
@pytest.mark.parametrize("wish", ["", "1"])
def test_a_list_that_cannot_be_followed_is_an_error(
    wish: str, text: str, message: str, gpus: GpuMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOTRON_FAST_CUDA", wish)
    monkeypatch.setenv("NANOTRON_FAST_CUDA_ARCHS", text)
    with pytest.raises(CompileError) as error:
        cuda_choice.find_cuda()
    assert message in str(error.value)


@pytest.mark.parametrize("printed", [None, "", "No devices were found\\n", "[N/A]\\n"])
def test_left_out_without_a_gpu_and_a_list(printed: str | None, gpus: GpuMaker) -> None:
    if printed is not None:
        gpus(printed)
    cuda, line = cuda_choice.find_cuda()
    assert cuda is None
    assert "is left out: there is " in line
    assert "no GPU to compile for; NANOTRON_FAST_CUDA_ARCHS='80;90;100' builds it" in line


def test_left_out_without_a_compiler(
    gpus: GpuMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list is no demand: it says what to compile for where there is something to do it."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setenv("NANOTRON_FAST_CUDA_ARCHS", "90")
    cuda, line = cuda_choice.find_cuda()
    assert cuda is None
    assert "is left out: there is no nvcc on PATH" in line


def test_left_out_when_told_so(gpus: GpuMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus("9.0\\n")
    monkeypatch.setenv("NANOTRON_FAST_CUDA", "0")
    monkeypatch.setenv("NANOTRON_FAST_CUDA_ARCHS", "90")
    assert cuda_choice.find_cuda()[0] is None


def test_demanded_without_a_gpu_and_a_list(gpus: GpuMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOTRON_FAST_CUDA", "1")
    cuda, line = cuda_choice.find_cuda()
    assert cuda.architectures == [80, 90, 100]
    assert "no GPU is here and NANOTRON_FAST_CUDA_ARCHS lists none" in line


@pytest.mark.parametrize(
    ("known", "printed", "problem"),
    [
        ((80, 90), "7.5\\n", "no longer knows sm_75, the GPU here"),
        ((), "9.0\\n", "--list-gpu-arch names no architecture"),
        ((35, 50), "", "lacks any of the architectures (80, 90, 100)"),
    ],
)
def test_a_compiler_that_does_not_know_them(
    known: tuple[int, ...],
    printed: str,
    problem: str,
    gpus: GpuMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_cuda(tmp_path / "other", known)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "other"))
    monkeypatch.setenv("NANOTRON_FAST_CUDA", "1")
    gpus(printed)
    with pytest.raises(CompileError) as error:
        cuda_choice.find_cuda()
    assert problem in str(error.value)


DRIVER = """
int cuInit(unsigned flags) { return RESULT + (int)flags; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 8 + device : attribute == 76 ? 6 * (1 - device) : -1;
  return 0;
}
"""


@pytest.mark.parametrize(("result", "expected"), [(0, [86, 90]), (100, [])])
def test_the_driver_is_asked_where_there_is_no_nvidia_smi(
    result: int, expected: list[int], tmp_path: Path
) -> None:
    """100 is the driver's own error for a machine without a GPU."""
    source, library = tmp_path / "driver.c", tmp_path / "libcuda.so.1"
    source.write_text(DRIVER)
    compiler = os.environ.get("CXX", "c++").split()
    options = ["-x", "c", f"-DRESULT={result}", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run([*compiler, *options, str(source)], check=True)
    assert load().driver_architectures(str(library)) == expected
    assert load().driver_architectures(str(tmp_path / "none.so")) == []


def test_a_build_says_what_it_leaves_out(gpus: GpuMaker, tmp_path: Path) -> None:
    """The same from the command that builds; the objects are there already."""
    if cuda_choice.gpu_architectures():
        pytest.skip("a GPU is here")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib"]
    path = os.pathsep.join([os.environ["PATH"], os.defpath])
    done = subprocess.run(
        [*command, str(tmp_path / "built")],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nanotron_fast._cuda, the packer for GPUs, is left out: there is " in done.stderr
    assert [each.name.partition(".")[0] for each in (tmp_path / "built").rglob("*.so")] == ["_C"]
