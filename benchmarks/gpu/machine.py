"""Where a run took place, and the two rates that everything else is a share of."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.rows import Row, emit
from benchmarks.gpu.timing import measure

_PACKAGES = ("torch", "triton", "numpy", "pytest", "transformers", "liger-kernel", "quack-kernels")


def commit() -> str:
    """The short hash of the tree; without git or a repository what COMMIT says, or "unknown"."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=10
        )
        found = done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    return found or os.environ.get("COMMIT") or "unknown"


def circumstances(context: Context) -> Row:
    """GPU, versions, commit and date."""
    from nanotron_fast.version import __version__

    row: Row = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "nanotron_fast": __version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count() or 1,
    }
    for package in _PACKAGES:
        try:
            row[package] = version(package)
        except PackageNotFoundError:
            row[package] = "absent"
    if context.dry:
        return row | {"gpu": "none: a dry run on the CPU"}
    properties = torch.cuda.get_device_properties(0)
    return row | {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "l2_mb": round(getattr(properties, "L2_cache_size", 0) / 1e6, 1),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }


def versions(operation: str, variant: str, context: Context) -> None:
    """Emits the row of the circumstances; tools that are absent are told apart, and no failure."""
    row: Row = {"kind": "machine", "operation": operation, "ok": True, **circumstances(context)}
    tools = ("git", "nvcc", "ncu", "compute-sanitizer", "c++")
    row["tools_absent"] = " ".join(tool for tool in tools if not shutil.which(tool)) or "none"
    emit(row)


def ceilings_of(context: Context) -> dict[str, float]:
    """A copy on the device (bytes read and written counted), and a bare bf16 product."""
    device = context.device
    num_bytes = context.size(1 << 30, 1 << 16)
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = context.size(8192, 32)
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    copy = measure(lambda: [lambda: target.copy_(source)], context)
    product = measure(lambda: [lambda: a @ b], context)
    return {
        "copy_gb_per_s": round(2 * num_bytes / copy.p50_ms / 1e6, 3),
        "matmul_tflop_per_s": round(2 * side**3 / product.p50_ms / 1e9, 5),
    }


def ceilings(operation: str, variant: str, context: Context) -> None:
    emit({"kind": "machine", "operation": operation, "ok": True, **ceilings_of(context)})
