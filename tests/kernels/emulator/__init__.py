"""Runs compiled kernels without a GPU: Triton's PTX, on an emulator of NVIDIA's machine.

    python -m tests.kernels.emulator [--arch 90] [--seed N] [--profile] [arguments of pytest]

Triton's interpreter computes with whole blocks of numpy, and shows what a kernel means. This shows
what a GPU is given: the threads, the layouts and the widths of accesses, the barriers, the copies
ahead, the tensor cores, for an architecture and in the configuration that it would be launched in.
Like compute-sanitizer it stops at accesses outside of what torch has allocated, at misaligned ones,
at races between blocks, or between warps that no barrier parts, and at copies that nobody waits
for. Shared memory that was not written reads as NaN.

The parts: `parser.cpp` reads PTX, `forms.cpp` lists the instructions that are known, with every
modifier, `run.cpp` runs blocks and warps, `arithmetic.cpp`, `transfers.cpp`, `bulk.cpp` and
`matrices.cpp` compute, `memory.cpp` watches what is touched, `profile.cpp` counts what that takes,
`driver.cpp` is the driver that Triton's launcher calls. What is not listed is an error.

What it does not show: time, the order in which tensor cores add, and the last bits of
approximations, which are as exact here as the machine's own functions.

What it does not detect, as warps run one after the other and see all that was written before:

- a fence that is missing, `fence.proxy.async` and `wgmma.fence` among them;
- races within a block through global memory, and races that depend on an mbarrier: once one warp
  has waited at it, all may read what came, and its own bytes are not watched;
- a product of `wgmma` that is used before it is waited for, or whose matrices are overwritten
  before: it is done at once;
- numbers that lanes of a warp write to one place of shared memory at once, where they differ:
  Triton itself has them write one sum, whose last bits differ between lanes;
- accesses beyond a view that stay within its storage.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_HERE = Path(__file__).parent


def build(folder: Path) -> Path:
    """Compiles the emulator, where it has changed, and gives the folder with its libcuda.so.1."""
    import triton

    compiler = os.environ.get("CXX", "g++")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    sources = sorted(_HERE.glob("*.cpp"))
    options = ("-std=c++20", "-O2", "-fwrapv", "-Wall", "-Wextra", "-fPIC", f"-I{include}")
    texts = " ".join((compiler, *options)).encode()
    headers = [*sorted(_HERE.glob("*.h")), _HERE.parent / "driver_calls.h"]
    texts += b"".join(path.read_bytes() for path in [*sources, *headers])
    made = folder / hashlib.sha256(texts).hexdigest()[:16]
    library = made / "libcuda.so.1"
    if library.exists():
        return made
    made.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        target = made / f"{source.stem}.o"
        subprocess.run([compiler, *options, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, sources))
    partial = made / "partial.so"
    link = (compiler, "-shared", "-Wl,-soname,libcuda.so.1", *objects, "-ldl", "-o", partial)
    subprocess.run(link, check=True)
    partial.rename(library)
    return made


def command(library: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """pytest under the emulator, and what its environment has beside that of this process."""
    run = [sys.executable, "-m", "pytest", "-p", "tests.kernels.emulator.plugin", *arguments]
    changes = {
        # It must come before the allocator that torch is to call through it.
        "LD_PRELOAD": str(library / "libcuda.so.1"),
        "TRITON_LIBCUDA_PATH": str(library),
        "TRITON_CACHE_DIR": str(library.parent / "triton"),
        "TRITON_INTERPRET": "0",
        "CUDA_VISIBLE_DEVICES": "",  # tensors lie in this process's memory, whatever GPU is here
    }
    return run, changes
