"""Times whole training steps beside transformers': on a GPU by default, with --cpu on the CPU.

    python benchmarks/bench_train.py [--only ours,8k] [--dry] [--save]
    python benchmarks/bench_train.py --cpu [--rounds 7] [--threads 1 2] [--save]

On a GPU: Llamas of 1 B and 3 B parameters at 4k and 8k tokens in bf16, over ours, transformers with
SDPA, with Liger and with torch.compile, and Nanotron with the drop-in off and on. Each row is a
process of its own, so one that runs out of memory says so and ends nothing else. The first step's
loss and norm have to be those of transformers with SDPA, or no time is given. With --dry tiny
models run on the CPU, kernels interpreted: to see that all of it works.

On the CPU: 100 M parameters in fp32, ours beside transformers and torch's fused AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

# The repository comes last: before the installed packages its kernels/ would shadow another one.
ROOT = Path(__file__).resolve().parents[1]
sys.path = [*(path for path in sys.path if path != str(ROOT / "benchmarks")), str(ROOT)]
RESULTS = ROOT / "benchmarks" / "results"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="100 M parameters on the CPU")
    parser.add_argument("--rounds", type=int, default=7, help="on the CPU")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, os.cpu_count()], help="on the CPU, in turn"
    )
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, interpreted")
    parser.add_argument("--only", default="", help="words of the names of rows, between commas")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds, on a GPU")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results")
    parser.add_argument("--row", nargs=2, metavar=("SETTING", "VARIANT"), help="one row, here")
    return parser.parse_args()


def _save(name: str, document: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(document, indent=1) + "\n")


def on_cpu(options: argparse.Namespace) -> int:
    # Threads that wait for others sleep, so that the process's time is that of its work. Read when
    # torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from benchmarks.gpu.context import Context
    from benchmarks.gpu.machine import circumstances
    from benchmarks.training.cpu import compare, show
    from benchmarks.training.shapes import SMALL

    about = circumstances(Context(dry=True)) | {"gpu": "none"}
    results = []
    for threads in dict.fromkeys(options.threads):
        torch.set_num_threads(threads)
        results.append(compare(SMALL, options.rounds))
        show(results[-1])
    if options.save:
        _save("train-cpu.json", {"environment": about, "training": results})
    return 0


def on_gpu(options: argparse.Namespace) -> int:
    import torch

    from benchmarks.gpu.context import Context
    from benchmarks.gpu.machine import circumstances
    from benchmarks.training.shapes import SETTINGS
    from benchmarks.training.variants import OURS, run, selected, table

    if not options.dry and not torch.cuda.is_available():
        print("bench_train.py: no CUDA device here; --dry runs on the CPU, --cpu times it")
        return 0
    words = [word.strip() for word in options.only.split(",") if word.strip()]
    pairs = selected(list(SETTINGS), words)
    if not pairs:
        sys.exit(f"bench_train.py: --only {options.only}: no row has all of these in its name")
    about = circumstances(Context(dry=options.dry))
    print(json.dumps(about), flush=True)
    command = [sys.executable, __file__, *(["--dry"] if options.dry else []), "--row"]
    rows = []
    for row in run(command, pairs, dry=options.dry, budget=options.budget):
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.save and not options.dry:
        _save("train.json", {"environment": about, "steps": rows})
    print("\n".join(table(rows)))
    return 1 if any(row["ok"] is False and row["variant"] == OURS for row in rows) else 0


def main() -> int:
    options = _options()
    if options.row:
        from benchmarks.training.row import row

        setting, variant = options.row
        print(json.dumps(row(setting, variant, dry=options.dry)), flush=True)
        return 0
    return on_cpu(options) if options.cpu else on_gpu(options)


if __name__ == "__main__":
    sys.exit(main())
