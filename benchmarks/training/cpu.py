"""A step on the CPU: ours beside transformers and torch's fused AdamW, in one process.

Rounds are interleaved, and every other one begins with the other side. What counts is the time of
the process, which other processes on the machine lengthen less than the time on the clock. Both
sides take the same steps on the same batches: their losses and norms have to agree in each.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch

from benchmarks.training.shapes import Shape
from benchmarks.training.sides import (
    Step,
    fill,
    our_decoder,
    our_step,
    transformers_model,
    transformers_step,
)

OURS, THEIRS = "ours", "transformers + fused AdamW"
# Relative, in a step. torch sums all squares of a tensor in one fp32 number on a CPU: its own norm
# of 12 million elements may be off by as much.
_LOSS_TOLERANCE, _NORM_TOLERANCE = 1e-5, 1e-3


def sides(shape: Shape) -> dict[str, Step]:
    """Both with the same weights."""
    device = torch.device("cpu")
    model = transformers_model(shape, device)
    decoder = our_decoder(shape, device, torch.float32)
    fill(decoder, model)
    return {
        THEIRS: transformers_step(shape, model, device, torch.float32),
        OURS: our_step(shape, decoder, device),
    }


def check(found: dict[str, tuple[float, float]], number: int) -> None:
    """Raises SystemExit where the sides disagree: what is wrong has no time."""
    (loss, norm), (other_loss, other_norm) = found[OURS], found[THEIRS]
    errors = abs(loss / other_loss - 1), abs(norm / other_norm - 1)
    if not (errors[0] <= _LOSS_TOLERANCE and errors[1] <= _NORM_TOLERANCE):
        raise SystemExit(
            f"step {number}: loss {loss} and norm {norm}, transformers has {other_loss} and "
            f"{other_norm}; no time is shown"
        )


def compare(shape: Shape, rounds: int) -> dict[str, Any]:
    """Seconds of every side in every round, and the ratios of ours to the other's."""
    steps = sides(shape)
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    clock: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        found: dict[str, tuple[float, float]] = {}
        for name in names if number % 2 else reversed(names):
            begun, begun_clock = time.process_time(), time.perf_counter()
            loss, norm = steps[name](number)
            found[name] = loss.item(), norm.item()
            if number:  # the first warms up
                seconds[name].append(time.process_time() - begun)
                clock[name].append(time.perf_counter() - begun_clock)
        check(found, number)
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    ratios = [a / b for a, b in zip(seconds[OURS], seconds[THEIRS], strict=True)]
    return {
        "parameters_m": round(shape.parameters / 1e6, 1),
        "tokens": shape.tokens,
        "threads": torch.get_num_threads(),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "sides": [
            {
                "name": name,
                "process_seconds": statistics.median(seconds[name]),
                "clock_seconds": statistics.median(clock[name]),
                "samples": seconds[name],
            }
            for name in names
        ],
    }


def show(result: dict[str, Any]) -> None:
    size, threads = f"{result['parameters_m']:.0f} M parameters", f"{result['threads']} threads"
    print(f"\nA step of {size}, {result['tokens']} tokens in fp32, {threads} (target: 1.0)")
    for side in result["sides"]:
        print(
            f"  {side['name']:30}{side['process_seconds']:9.3f} s of the process"
            f"{side['clock_seconds']:9.3f} s on the clock"
        )
    ratios = result["ratios"]
    spread = f"in {len(ratios)} rounds {min(ratios):.3f} to {max(ratios):.3f}"
    print(f"  ratio of the process times {result['ratio']:.3f}, {spread}")
