"""What of CUDA a build of `nanotron_fast._cuda` finds, and what it compiles for.

setup.py has the environment variables. The architectures are, in this order: those that
NANOTRON_FAST_CUDA_ARCHS lists; those of the GPUs that are here; and, where NANOTRON_FAST_CUDA=1
demands a build without either, DEFAULT_ARCHITECTURES.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from setuptools.errors import CompileError

MODULE = "nanotron_fast._cuda"
WISH, LIST = "NANOTRON_FAST_CUDA", "NANOTRON_FAST_CUDA_ARCHS"
DEFAULT_ARCHITECTURES = (80, 90, 100)
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
# Enough for a driver that has to wake its GPUs.
PATIENCE_SECONDS = 60
# CUdevice_attribute: the compute capability's two parts.
MAJOR, MINOR = 75, 76


def find_nvcc() -> Path | None:
    """The CUDA compiler: CUDA_HOME's alone where that is set, else the first that is there."""
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home, "bin", "nvcc")] if home else []
    if not home:
        on_path = shutil.which("nvcc")
        candidates += [Path(on_path)] if on_path else []
        candidates.append(Path("/usr/local/cuda/bin/nvcc"))
        for folder in dict.fromkeys([sysconfig.get_path("purelib"), *sys.path]):
            candidates += sorted(Path(folder or ".").glob("nvidia/*/bin/nvcc"))
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def listed_architectures() -> list[int]:
    """What NANOTRON_FAST_CUDA_ARCHS lists, sorted; empty where it is not set.

    Raises CompileError for what is no list of architectures.
    """
    text = os.environ.get(LIST, "")
    found = set()
    for word in re.split(r"[;,\s]+", text.strip()):
        number = re.fullmatch(r"(\d{1,2})\.?(\d)", word)
        if number is None and text.strip():
            raise CompileError(
                f"{LIST}={text}: {word!r} is no architecture; name them by number, with ; between: "
                f"{names(DEFAULT_ARCHITECTURES, prefix='', between=';')}"
            )
        found |= {int(number[1] + number[2])} if number else set()
    return sorted(found)


def names(architectures: Iterable[int], *, prefix: str = "sm_", between: str = ", ") -> str:
    return between.join(f"{prefix}{each}" for each in architectures)


def gpu_architectures() -> list[int]:
    """Of the GPUs that are here, sorted: 90 for an H100. Empty where there is none."""
    try:
        done = subprocess.run(
            NVIDIA_SMI, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return driver_architectures()  # nvidia-smi is no part of many containers
    found = re.findall(r"^\s*(\d+)\.(\d)\s*$", done.stdout, re.MULTILINE)
    return sorted({int(major + minor) for major, minor in found}) or driver_architectures()


def driver_architectures(library: str = "libcuda.so.1") -> list[int]:
    """The same from the driver itself."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return []
    count, value = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = set()
    for device in range(count.value):
        parts = []
        for attribute in (MAJOR, MINOR):
            if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) == 0:
                parts.append(value.value)
        found |= {10 * parts[0] + parts[1]} if len(parts) == 2 else set()
    return sorted(found)


class Cuda:
    """A CUDA compiler: what it knows, what it compiles for and why, where its runtime is."""

    def __init__(self, nvcc: Path) -> None:
        self.nvcc = nvcc
        # Its own word for where it is: what is on PATH may be a script that calls another.
        dry_run = self._output("--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull)
        top = re.search(r"^#\$ TOP=(.*)$", dry_run, re.MULTILINE)
        self.home = Path(top[1].strip() if top else nvcc.parents[1]).resolve()
        known = re.findall(r"compute_(\d+)\b", self._output("--list-gpu-arch"))
        self.known = sorted(set(map(int, known)))
        self.architectures: list[int] = []
        self.reason = ""
        folders = ("lib64", "lib", "targets/*/lib", "../cuda_runtime/lib")
        archives = (self.home.glob(f"{folder}/libcudart_static.a") for folder in folders)
        found = list(chain.from_iterable(archives))
        self.runtime = found[0] if found else None

    def _output(self, *options: str) -> str:
        done = subprocess.run([self.nvcc, *options], capture_output=True, text=True)
        return done.stdout + done.stderr

    def choose(self, listed: list[int], *, is_demanded: bool) -> str:
        """Sets `architectures` and `reason`. Says what is missing; empty where nothing is.

        Raises CompileError for a list that this compiler cannot follow.
        """
        if not self.known:
            return f"{self.nvcc} --list-gpu-arch names no architecture"
        unknown = [each for each in listed if each not in self.known]
        if unknown:
            raise CompileError(
                f"{LIST}={os.environ[LIST]}: {self.nvcc} does not know {names(unknown)}, only "
                f"{names(self.known)}"
            )
        gpus = [] if listed else gpu_architectures()
        if listed:
            self.architectures, self.reason = listed, f"as {LIST} says"
        elif gpus:
            # A GPU newer than the compiler runs what is made for the newest before it.
            older = [[each for each in self.known if each <= gpu] for gpu in gpus]
            self.architectures = sorted({each[-1] for each in older if each})
            self.reason = f"the GPU here is {names(gpus)}"
            if not self.architectures:
                return f"{self.nvcc} no longer knows {names(gpus)}, the GPU here"
        elif is_demanded:
            self.architectures = [each for each in DEFAULT_ARCHITECTURES if each in self.known]
            self.reason = f"no GPU is here and {LIST} lists none"
        else:
            return (
                f"there is {self.nvcc}, but no GPU to compile for; "
                f"{LIST}='{names(DEFAULT_ARCHITECTURES, prefix='', between=';')}' builds it "
                "for those, and so does NANOTRON_FAST_CUDA=1"
            )
        if not self.architectures:
            return f"{self.nvcc} lacks any of the architectures {DEFAULT_ARCHITECTURES}"
        return "" if self.runtime else f"{self.nvcc} lacks libcudart_static.a"

    def compile_command(self, cxx: list[str], warnings: list[str]) -> list[str]:
        """How nvcc is called, but for the files. Later GPUs run the newest architecture's PTX."""
        flags = ["-std=c++17", "-O3", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        flags += [f"-Xcompiler={','.join(warnings)}"]
        for arch in self.architectures:
            flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        newest = self.architectures[-1]
        flags += ["-gencode", f"arch=compute_{newest},code=compute_{newest}", "--threads=0"]
        # Pip's packages have the runtime's headers in a folder of their own.
        headers = self.home.parent / "cuda_runtime" / "include"
        flags += ["-isystem", str(headers)] if headers.is_dir() else []
        flags += [] if "NVCC_CCBIN" in os.environ or len(cxx) > 1 else ["-ccbin", cxx[0]]
        return [str(self.nvcc), *flags]


def find_cuda() -> tuple[Cuda | None, str]:
    """What to build with, and a line that says what is built or left out, why, and what to do.

    Raises CompileError for variables whose values are none, and where NANOTRON_FAST_CUDA=1 demands
    what cannot be.
    """
    wish = os.environ.get(WISH, "")
    if wish not in ("", "0", "1"):
        raise CompileError(f"{WISH}={wish}: set it to 0 or 1, or not at all")
    if wish == "0":
        return None, f"{MODULE}, the packer for GPUs, is left out: {WISH}=0"
    listed = listed_architectures()
    nvcc = find_nvcc()
    cuda = None if nvcc is None else Cuda(nvcc)
    if cuda is None:
        problem = (
            "there is no nvcc on PATH, in /usr/local/cuda or among Python's nvidia packages "
            "(where CUDA_HOME is set, only there)"
        )
    else:
        problem = cuda.choose(listed, is_demanded=wish == "1")
    if problem and wish == "1":
        raise CompileError(f"{WISH}=1: {problem}")
    if cuda is None or problem:
        return None, f"{MODULE}, the packer for GPUs, is left out: {problem}"
    return cuda, (
        f"{MODULE}, the packer for GPUs, is built for {names(cuda.architectures)} ({cuda.reason}); "
        f"{LIST} picks others, {WISH}=0 leaves it out"
    )
