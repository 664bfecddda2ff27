"""Times the kernels on a GPU beside torch, torch.compile and the peers that are installed.

Each case is checked first: a variant that disagrees with the reference gets no time. Rounds run the
variants in turn, with the cache flushed before each; p20, p50 and p80 of a round's times are kept.
The ceilings, a copy on the device and a bare matrix product, are measured in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import kernel_cases
import torch
from kernel_cases import Case
from torch import Tensor

import nanotron_fast

RESULTS = Path(__file__).parent / "results"
FLUSH_BYTES = 256 << 20  # more than the cache holds


def as_list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def run_once(function: Callable, tensors: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    outputs = as_list(function(*tensors))
    wanted = [t for t in tensors if t.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, wanted, grads)]


def gradients_for(case: Case) -> list[Tensor]:
    reference = next(iter(case.variants.values()))
    torch.manual_seed(1)
    return [torch.randn_like(out) for out in as_list(reference(*case.tensors()))]


def disagreement(case: Case, name: str, grads: list[Tensor]) -> float:
    """The largest error of outputs and gradients, as a share of the reference's largest value."""
    results = []
    for variant in (next(iter(case.variants)), name):
        torch.manual_seed(0)
        results.append(run_once(case.variants[variant], case.tensors(), grads))
    worst = 0.0
    for expected, actual in zip(*results, strict=True):
        scale = expected.float().abs().max().item() or 1.0
        worst = max(worst, (actual.float() - expected.float()).abs().max().item() / scale)
    return worst


class Timer:
    """Milliseconds on the device, the cache flushed before each call."""

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, prepare: Callable[[], Any], work: Callable[[Any], Any]) -> float:
        prepared = prepare()
        self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work(prepared)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def quantiles(samples: list[float]) -> dict[str, float]:
    ordered = sorted(samples)
    at = {p: ordered[min(len(ordered) - 1, int(p / 100 * len(ordered)))] for p in (20, 50, 80)}
    return {f"p{p}_ms": round(value, 5) for p, value in at.items()}


def phases(case: Case, grads: list[Tensor]) -> dict[str, tuple[Callable, Callable, int | None]]:
    """Phase -> (prepare(variant), work(prepared), bytes or FLOPs of the floor)."""
    wanted = [t.requires_grad for t in case.tensors()]

    def inputs(function: Callable) -> tuple[Callable, list[Tensor]]:
        return function, case.tensors()

    def forward(prepared: tuple[Callable, list[Tensor]]) -> Any:
        function, tensors = prepared
        return function(*tensors)

    def outputs(function: Callable) -> tuple[list[Tensor], list[Tensor]]:
        tensors = case.tensors()
        return as_list(function(*tensors)), tensors

    def backward(prepared: tuple[list[Tensor], list[Tensor]]) -> None:
        outs, tensors = prepared
        leaves = [t for t, is_wanted in zip(tensors, wanted, strict=True) if is_wanted]
        torch.autograd.grad(outs, leaves, grads)

    def both(prepared: tuple[Callable, list[Tensor]]) -> None:
        function, tensors = prepared
        run_once(function, tensors, grads)

    floors = (
        case.bytes_forward or case.flops_forward,
        case.bytes_backward or case.flops_backward,
    )
    if case.is_joint:
        return {"forward + backward": (inputs, both, sum(floor or 0 for floor in floors))}
    return {"forward": (inputs, forward, floors[0]), "backward": (outputs, backward, floors[1])}


def measure(case: Case, rounds: int, timer: Timer, ceilings: dict[str, float]) -> list[dict]:
    grads = gradients_for(case)
    names, rows = [], []
    for name in case.variants:
        worst = disagreement(case, name, grads)
        if worst > case.tolerance:
            print(f"  {case.op} {case.shape} {name}: WRONG by {worst:.3g}, not timed")
            rows.append({"op": case.op, "shape": case.shape, "variant": name, "wrong_by": worst})
        else:
            names.append(name)
    is_bytes = case.bytes_forward is not None
    ceiling = ceilings["copy_gb_per_s" if is_bytes else "matmul_tflop_per_s"]
    for phase, (prepare, work, floor) in phases(case, grads).items():
        samples: dict[str, list[float]] = {name: [] for name in names}
        for round_index in range(rounds + 3):
            for name in names:
                function = case.variants[name]
                elapsed = timer(partial(prepare, function), work)
                if round_index >= 3:  # the first compile and warm up
                    samples[name].append(elapsed)
        for name in names:
            row = {"op": case.op, "shape": case.shape, "phase": phase, "variant": name}
            row |= quantiles(samples[name])
            if floor:
                rate = floor / (row["p50_ms"] * 1e-3) / (1e9 if is_bytes else 1e12)
                row["gb_per_s" if is_bytes else "tflop_per_s"] = round(rate, 1)
                row["fraction_of_ceiling"] = round(rate / ceiling, 3)
            rows.append(row)
            print("  " + "  ".join(f"{key} {value}" for key, value in row.items()))
    for name, reason in case.absent.items():
        rows.append({"op": case.op, "shape": case.shape, "variant": name, "absent": reason})
    return rows


def measure_ceilings(device: torch.device, timer: Timer, rounds: int) -> dict[str, float]:
    """A copy on the device (read and write counted) and a bare bf16 product."""
    source = torch.empty(1 << 30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copies = [timer(lambda: None, lambda _: target.copy_(source)) for _ in range(rounds + 3)][3:]
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    products = [timer(lambda: None, lambda _: a @ b) for _ in range(rounds + 3)][3:]
    return {
        "copy_gb_per_s": 2 * source.numel() / (quantiles(copies)["p50_ms"] * 1e-3) / 1e9,
        "matmul_tflop_per_s": 2 * 8192**3 / (quantiles(products)["p50_ms"] * 1e-3) / 1e12,
    }


def circumstances(device: torch.device) -> dict[str, str]:
    import triton

    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent).stdout
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.strip() or "unknown",
        "gpu": torch.cuda.get_device_name(device),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "nanotron_fast": nanotron_fast.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", default="", help="operations whose name has this in it")
    parser.add_argument("--save", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_kernels.py: no CUDA device here; `make bench` times the CPU's paths")
    device = torch.device("cuda")
    timer = Timer(device)
    about = circumstances(device)
    ceilings = measure_ceilings(device, timer, options.rounds)
    print(json.dumps(about | ceilings))
    rows = []
    for case in kernel_cases.gpu_cases(device):
        if options.only in case.op:
            rows += measure(case, options.rounds, timer, ceilings)
            torch.cuda.empty_cache()
    if options.save:
        document = {"environment": about, "ceilings": ceilings, "rows": rows}
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
