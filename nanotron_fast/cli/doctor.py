"""What would be slow or missing on this machine, and how to get it: `nanotron-fast doctor`."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nanotron_fast.checkpoints.remote.urls import as_path
from nanotron_fast.cli import doctor_files
from nanotron_fast.cli.findings import Finding
from nanotron_fast.errors import ConfigError, one_line
from nanotron_fast.units import size

_LEAST_MEMORY_BYTES = 10**9
_LEAST_SHARED_BYTES = 10**9
_DRIVER = Path("/proc/driver/nvidia/version")


class Package(NamedTuple):
    """A package that not all need: its extra of this package, and what it is for."""

    name: str
    extra: str
    purpose: str


_TRITON = "the kernels of a GPU; train, generate, run and verify --logits want it on a CPU too"
PACKAGES = (
    Package("torch", "train", "training, generating, verify --logits, and several processes"),
    Package("triton", "kernels", _TRITON),
    Package("transformers", "train", "tokenizers, and verify --logits"),
    Package("datasets", "train", "text of the datasets library"),
    Package("huggingface_hub", "", "models by their id on the Hub"),
    Package("fsspec", "s3", "checkpoints at URLs"),
    Package("s3fs", "s3", "checkpoints at s3:// URLs"),
    Package("matplotlib", "plot", "nanotron-fast plot"),
)
# Without these nothing can be converted: a damaged installation.
_NEEDED = (("yaml", "pyyaml"), ("rich", "rich"))


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found, in the order in which it is told."""

    findings: tuple[Finding, ...]

    @property
    def is_usable(self) -> bool:
        """Whether a checkpoint can be converted here."""
        return all(each.state != "broken" for each in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The contract of `doctor --json`."""
        return {
            "usable": self.is_usable,
            "findings": [asdict(each) for each in self.findings],
        }


def diagnose(place: str | Path | None = None) -> Diagnosis:
    """Looks around; what is written meanwhile has no name and is gone at the end.

    Args:
        place: a directory that checkpoints are to be written to; by default the current one.

    Raises ConfigError where there is no such directory.
    """
    folder = Path("." if place is None else as_path(place, "DIR"))
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such directory")
    found = [*_engine(), *_needed(), *_packages(), *_accelerator()]
    found += [*doctor_files.findings(folder), *_memory(), _cores()]
    return Diagnosis(tuple(found))


def _engine() -> Iterator[Finding]:
    try:
        from nanotron_fast import _C
    except ImportError as error:
        yield Finding(
            "engine",
            "broken",
            f"the native engine cannot be imported: {one_line(error)}",
            "install nanotron_fast again; from its source that takes a C++20 compiler",
        )
        return
    levels, hashes = _C.simd_levels(), _C.sha256_levels()
    wanted = os.environ.get("NANOTRON_FAST_SIMD", "")
    if wanted and wanted not in levels:
        what = f"NANOTRON_FAST_SIMD={wanted} is none of {', '.join(levels)}"
        yield Finding("engine", "broken", what, "unset NANOTRON_FAST_SIMD")
        return
    yield Finding("engine", "ok", "native")
    yield _level("casts", wanted or levels[-1], levels[-1], "a processor with AVX2 or AVX-512")
    yield _level("hashes", hashes[-1], hashes[-1], "a processor with the SHA extensions")


def _level(name: str, used: str, best: str, remedy: str) -> Finding:
    """What the engine uses of a processor, beside what it could."""
    if used != best:
        found = f"with {used}, though this processor can do {best}"
        return Finding(name, "slow", found, "unset NANOTRON_FAST_SIMD")
    if best == "scalar":
        return Finding(name, "slow", "with scalar instructions; copies are as fast", remedy)
    return Finding(name, "ok", f"with {used}, the best that this processor can do")


def _needed() -> Iterator[Finding]:
    for module, package in _NEEDED:
        if find_spec(module) is None:
            yield Finding(package, "broken", "it is not installed", f"pip install {package}")


def _packages() -> Iterator[Finding]:
    for package in PACKAGES:
        if find_spec(package.name) is None:
            found = f"not installed: for {package.purpose}"
            yield Finding(package.name, "missing", found, _install(package))
            continue
        try:
            version = metadata.version(package.name)
        except metadata.PackageNotFoundError:
            version = "of no version"
        yield Finding(package.name, "ok", version)


def _install(package: Package) -> str:
    """The command that installs a package, with its extra where this installation has that."""
    try:
        extras = metadata.metadata("nanotron_fast").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        extras = []
    if package.extra in extras:
        return f"pip install 'nanotron_fast[{package.extra}]'"
    return f"pip install {package.name}"


def _accelerator() -> Iterator[Finding]:
    has_gpu = False
    if find_spec("torch") is not None:
        try:
            import torch
        except (ImportError, OSError) as error:
            found = f"it cannot be imported: {one_line(error)}"
            yield Finding("import torch", "missing", found, "pip install --force-reinstall torch")
        else:
            has_gpu = torch.cuda.is_available()
            yield _gpus(torch) if has_gpu else _no_gpu(torch)
    if has_gpu:
        yield _packer()
    if find_spec("triton") is not None:
        yield _compiler(is_needed=has_gpu)


def _gpus(torch: Any) -> Finding:
    cards = [torch.cuda.get_device_properties(each) for each in range(torch.cuda.device_count())]
    told = [
        f"{each.name}, sm_{each.major}{each.minor}, {size(each.total_memory)}" for each in cards
    ]
    return Finding("GPU", "ok", "; ".join(told))


def _no_gpu(torch: Any) -> Finding:
    if not _DRIVER.exists():
        found = "none: training and kernels take the CPU's paths; conversion needs none"
        return Finding("GPU", "slow", found, "a machine with an NVIDIA GPU")
    if torch.version.cuda is None:
        found = f"there is a driver, but torch {torch.__version__} is built for CPUs alone"
        return Finding("GPU", "missing", found, "install a torch that is built for CUDA")
    found = f"there is a driver, but torch {torch.__version__} sees no GPU"
    remedy = "nvidia-smi says whether the driver works; look at CUDA_VISIBLE_DEVICES"
    return Finding("GPU", "missing", found, remedy)


def _packer() -> Finding:
    try:
        from nanotron_fast import _cuda
    except ImportError:
        found = "not built: Triton's kernel packs and shards, after its compilation"
        remedy = "install nanotron_fast from its source where nvcc is on the PATH"
        return Finding("packer", "slow", found, remedy)
    built = ", ".join(f"sm_{each}" for each in _cuda.ARCHITECTURES)
    return Finding("packer", "ok", f"CUDA for {built}")


def _compiler(*, is_needed: bool) -> Finding:
    """Triton compiles what launches a kernel, with a C compiler and Python's headers."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    compiler = next((each for each in names if shutil.which(each.split()[0])), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if compiler and header.is_file():
        return Finding("compiler", "ok", f"{shutil.which(compiler.split()[0])}, for Triton")
    lacking = f"{header}" if compiler else f"{' or '.join(names)}"
    found = f"{lacking} is not there, and Triton compiles with it"
    if not is_needed:
        return Finding("compiler", "ok", f"{found}; not needed without a GPU")
    wanted = "Python's headers (python3-dev)" if compiler else "a C compiler (gcc)"
    return Finding("compiler", "missing", found, f"install {wanted}")


def _memory() -> Iterator[Finding]:
    from nanotron_fast.checkpoints.io_modes import available_bytes

    free = available_bytes()
    state: Literal["ok", "slow"] = "ok" if free >= _LEAST_MEMORY_BYTES else "slow"
    remedy = "raise the limit of the container or the job, or end other programs"
    yield Finding("memory", state, f"{size(free)} free", remedy if state == "slow" else "")
    shared = Path("/dev/shm")
    if not shared.is_dir():
        found = "there is no /dev/shm, through which NCCL joins the GPUs of a machine"
        yield Finding("shared memory", "missing", found, "mount a tmpfs there")
        return
    total = doctor_files.total_bytes(shared)
    if total < _LEAST_SHARED_BYTES:
        found = f"{size(total)} in /dev/shm, through which NCCL joins the GPUs of a machine"
        remedy = "docker run --shm-size=8g, or --ipc=host"
        yield Finding("shared memory", "slow", found, remedy)
    else:
        yield Finding("shared memory", "ok", f"{size(total)} in /dev/shm")


def _cores() -> Finding:
    there = os.cpu_count() or 1
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    return Finding("cores", "ok", f"{ours} of {there}")


def lines(found: Diagnosis) -> Iterator[str]:
    """For people."""
    counts = {
        state: sum(each.state == state for each in found.findings)
        for state in ("broken", "missing", "slow", "ok")
    }
    for each in found.findings:
        yield f"{each.state:<9}{each.name:<17}{each.found}"
        if each.remedy:
            yield f"{'':26}to mend it: {each.remedy}"
    told = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
    yield f"{told}: " + (
        "checkpoints can be converted here" if found.is_usable else "nothing can work here"
    )
