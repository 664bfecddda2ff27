"""Times the kernels on a GPU beside torch, torch.compile and the peers that are installed.

Each case is checked first: a variant that disagrees with the reference gets no time. Kernels are
timed, not Python: see benchmarks/gpu/timing.py. The ceilings, a copy on the device and a bare
matrix product, are measured in the same run, and every rate is a fraction of one of them.
With --dry tiny cases run on the CPU, the kernels interpreted: to see that all of it works.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

# The repository comes last: before the installed packages its kernels/ would shadow another one.
ROOT = Path(__file__).resolve().parents[1]
sys.path = [*(path for path in sys.path if path != str(ROOT / "benchmarks")), str(ROOT)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="operations, between commas")
    parser.add_argument("--save", type=Path, help="a JSON file to write")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, interpreted")
    return parser.parse_args()


def main() -> int:
    options = _options()
    if options.dry:
        # Before the first import of Triton, which reads it.
        os.environ |= {"TRITON_INTERPRET": "1", "NANOTRON_FAST_BACKEND": "triton"}
    import torch

    from benchmarks.gpu.cases.case import Setting
    from benchmarks.gpu.cases.registry import MODULES, cases_of
    from benchmarks.gpu.context import Context
    from benchmarks.gpu.machine import ceilings_of, circumstances
    from benchmarks.gpu.ratios import rows_of
    from benchmarks.gpu.table import table

    if not options.dry and not torch.cuda.is_available():
        print("bench_kernels.py: no CUDA device here, nothing is timed; --dry runs on the CPU")
        return 0
    only = [word.strip() for word in options.only.split(",") if word.strip()]
    unknown = [word for word in only if word not in MODULES]
    if unknown:
        sys.exit(f"bench_kernels.py: --only {unknown[0]}: choose of {', '.join(MODULES)}")
    context = Context(dry=options.dry)
    about, ceilings = circumstances(context), ceilings_of(context)
    print(json.dumps(about | ceilings), flush=True)
    context = Context(dry=options.dry, ceilings=ceilings)
    rows = []
    for operation in only or MODULES:
        for case in cases_of(operation, Setting.of(context)):
            for row in rows_of(case, context):
                rows.append(row)
                print(json.dumps(row), flush=True)
    if options.save:
        document = {"environment": about, "ceilings": ceilings, "rows": rows}
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(json.dumps(document, indent=1) + "\n")
    print(table(rows))
    return 1 if any(row["ok"] is False and row["variant"].startswith("ours") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
