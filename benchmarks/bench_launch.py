"""What a call of each operation costs in Python and dispatch, with launches that go nowhere.

    python benchmarks/bench_launch.py [--only glu,adamw_step_] [--rounds 60] [--save FILE]

Each operation is timed beside a bare autograd function around the same launches, forward, and
forward with backward, in turns; the least of many rounds counts, for the rest is the machine's
noise. A row is `ok` where the operation takes at most LIMIT_RATIO times the bare function, or a
list of tensors at most LIMIT_MICROSECONDS. No GPU is needed, and none is used.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# The repository comes last: before the installed packages its kernels/ would shadow another one.
ROOT = Path(__file__).resolve().parents[1]
sys.path = [*(path for path in sys.path if path != str(ROOT / "benchmarks")), str(ROOT)]

LIMIT_RATIO = 1.5
LIMIT_MICROSECONDS = 300.0
_CALLS = 20


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="operations, between commas")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--save", type=Path, help="a JSON file to write")
    return parser.parse_args()


def microseconds(
    variants: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, tuple[float, float]]:
    """The least and the median of a call of each, whose turns follow each other."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        for _ in range(3):
            call()
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for name, call in variants.items():
            start = time.thread_time_ns()
            for _ in range(_CALLS):
                call()
            samples[name].append((time.thread_time_ns() - start) / _CALLS / 1e3)
    gc.enable()
    return {name: (min(each), sorted(each)[len(each) // 2]) for name, each in samples.items()}


def num_calls(function: Callable[[], object]) -> int:
    """How many functions, of Python and of C, a call of this one calls: the same on any machine."""
    function()
    events: list[str] = []
    sys.setprofile(lambda frame, event, argument: events.append(event))
    try:
        function()
    finally:
        sys.setprofile(None)
    return events.count("call") + events.count("c_call")


def row_of_operation(case: Any, rounds: int) -> dict[str, Any]:
    """Of an operation with a gradient: its times, the bare function's, and their ratios."""
    import torch

    from benchmarks.launch.cases import Bare

    bare = Bare(case)

    def both(function: Callable[..., Any]) -> Callable[[], object]:
        out = function(*case.tensors)
        outputs = [out] if isinstance(out, torch.Tensor) else [*out]
        gradients = [torch.ones_like(output) for output in outputs]

        def call() -> object:
            out = function(*case.tensors)
            return torch.autograd.grad(out, case.leaves, gradients)

        return call

    variants: dict[str, Callable[[], object]] = {
        "ours": lambda: case.call(*case.tensors),
        "bare": lambda: bare(*case.tensors),
        "ours with backward": both(case.call),
        "bare with backward": both(bare),
    }
    times = microseconds(variants, rounds)
    row = {
        "operation": case.name,
        "launches": len(bare.launches),
        "launches_backward": len(bare.launches_backward),
    }
    for name, (least, median) in times.items():
        row |= {f"{name} us": round(least, 1), f"{name} p50 us": round(median, 1)}
        row[f"{name} calls"] = num_calls(variants[name])
    row["ratio"] = round(times["ours"][0] / times["bare"][0], 2)
    row["ratio with backward"] = round(
        times["ours with backward"][0] / times["bare with backward"][0], 2
    )
    row["ok"] = max(row["ratio"], row["ratio with backward"]) <= LIMIT_RATIO
    return row


def row_of_lists(name: str, call: Callable[[], object], rounds: int) -> dict[str, Any]:
    """Of an operation on lists."""
    from benchmarks.launch.cases import NUM_TENSORS

    (least, median) = microseconds({name: call}, rounds)[name]
    return {
        "operation": name,
        "tensors": NUM_TENSORS,
        "ours us": round(least, 1),
        "ours p50 us": round(median, 1),
        "ours calls": num_calls(call),
        "ok": least <= LIMIT_MICROSECONDS,
    }


def main() -> int:
    options = _options()
    os.environ.pop("TRITON_INTERPRET", None)  # before the first import of Triton, which reads it
    os.environ["NANOTRON_FAST_BACKEND"] = "triton"
    import torch

    from benchmarks.gpu.context import Context
    from benchmarks.gpu.machine import circumstances
    from benchmarks.launch import driver
    from benchmarks.launch.cases import lists, operations

    driver.install()
    torch.set_num_threads(1)
    only = [word.strip() for word in options.only.split(",") if word.strip()]
    cases, on_lists = {case.name: case for case in operations()}, lists()
    unknown = [word for word in only if word not in cases and word not in on_lists]
    if unknown:
        known = ", ".join((*cases, *on_lists))
        print(f"bench_launch.py: --only {unknown[0]}: choose of {known}", file=sys.stderr)
        return 2
    rows = []
    for name in only or (*cases, *on_lists):
        if name in cases:
            rows.append(row_of_operation(cases[name], options.rounds))
        else:
            rows.append(row_of_lists(name, on_lists[name], options.rounds))
        print(json.dumps(rows[-1]), flush=True)
    if options.save:
        document = {"environment": circumstances(Context(dry=True)), "launch": rows}
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(json.dumps(document, indent=1) + "\n")
    over = [row["operation"] for row in rows if not row["ok"]]
    if over:  # a figure, and no fault: what else the machine does is in it
        print(f"over the limit: {', '.join(over)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
