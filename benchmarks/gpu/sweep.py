"""`make tune`: which configurations are faster than the rules, as a file that kernels read.

Each operation is a process of its own, the most valuable ones first; `tune` is what runs in it.
Configurations that were faster by more than noise go into a file of measured entries, which
nanotron_fast/kernels/runtime/tuning.py explains; all that was timed is in the table and the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from benchmarks.gpu.jobs import PRECOMPILE_SECONDS, Job, Phase
from benchmarks.gpu.main import BUILD, end_with_make, words
from benchmarks.gpu.rows import Row, RowFile, failures
from benchmarks.gpu.runner import Runner, guarded

# Operation of `tuning.OPERATIONS` -> the operation whose cases launch it, the phase to time, and
# the variant of ours.
SWEPT: dict[str, tuple[str, str, str]] = {
    "attention_order": ("attention", "forward + backward", "ours, auto"),
    "rms_norm_forward": ("rms_norm", "forward", "ours"),
    "rms_norm_backward": ("rms_norm", "backward", "ours"),
    "glu_forward": ("glu", "forward", "ours"),
    "glu_backward": ("glu", "backward", "ours"),
    "adamw": ("adamw", "forward", "ours"),
    "cross_entropy_statistics": ("cross_entropy", "forward", "ours"),
    "cross_entropy_gradient": ("cross_entropy", "forward + backward", "ours"),
    "rope": ("rope_qkv", "forward", "ours"),
    "attention_forward": ("attention", "forward", "ours, Triton"),
    "attention_dq": ("attention", "backward", "ours, Triton"),
    "attention_dkv": ("attention", "backward", "ours, Triton"),
    "linear_cross_entropy": ("linear_cross_entropy", "forward + backward", "ours"),
    "matmul_glu": ("mlp_block", "forward", "ours, fused"),
    "matmul_rope": ("attention_block", "forward", "ours, fused"),
    "grad_norm": ("clip", "forward", "ours"),
    "clip_grads": ("clip", "forward", "ours"),
    "accumulate": ("accumulate", "forward", "ours"),
    "embedding_gather": ("embedding", "forward", "ours"),
    "embedding_sum": ("embedding", "backward", "ours"),
    "rope_normed_forward": ("rope_normed", "forward", "ours"),
    "rope_normed_backward": ("rope_normed", "backward", "ours"),
    "pack": ("pack", "forward", "ours"),
}
# What the file is called in a folder.
NAME = "tuned.json"
_SECONDS = 120.0
# No kernel of its own is compiled for it.
_WITHOUT_PRECOMPILING = ("attention_order", "linear_cross_entropy")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sweep.py", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--only", default="", help="operations, between commas")
    parser.add_argument("--budget", type=float, default=580.0, help="seconds for all of it")
    parser.add_argument("--out", type=Path, help=f"the file to write, or a folder for {NAME}")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny, kernels interpreted")
    return parser.parse_args()


def phases(only: list[str], *, dry: bool, cpus: int) -> list[Phase]:
    """Raises SystemExit for an operation that is none."""
    unknown = [name for name in only if name not in SWEPT]
    if unknown:
        raise SystemExit(f"sweep.py: --only {unknown[0]}: choose of {', '.join(SWEPT)}")
    names = [name for name in SWEPT if not only or name in only]
    # Rules are what candidates are timed beside, also where something was measured before. The
    # packer's CUDA extension is not what is tuned.
    environment = (("NANOTRON_FAST_MEASURED", "off"),)
    in_triton = (("NANOTRON_FAST_BACKEND", "triton"),)

    def job(name: str, function: str, limit: float) -> Job:
        kind = "machine" if function == "precompile" else "tune"
        own = environment + (in_triton if name == "pack" else ())
        return Job(kind, name, target=f"tune:{function}", environment=own, limit=limit)

    compiled = [name for name in names if not dry and name not in _WITHOUT_PRECOMPILING]
    return [
        Phase("machine", (Job("machine", "versions", target="machine:versions"),), 1),
        Phase(
            "precompile",
            tuple(job(name, "precompile", PRECOMPILE_SECONDS) for name in compiled),
            min(12, cpus),
            0.3,
        ),
        Phase("tune", tuple(job(name, "run", _SECONDS) for name in names), 1, tunes_anew=True),
    ]


def document_of(rows: list[Row], before: dict[str, Any], *, dry: bool) -> dict[str, Any]:
    """The file: entries of operations that this run swept whole, and of others as they were.

    Of one that it was cut off in, or that failed in a case, what it found takes the place of the
    entries with the same keys. Raises SystemExit where nothing is known of the machine.
    """
    machine = next((row for row in rows if row["operation"] == "versions" and row["ok"]), None)
    if machine is None:
        raise SystemExit("sweep.py: nothing is known of this machine: no file is written")
    found = {row["operation"]: row for row in rows if "entries" in row}  # the last of each
    swept = [operation for operation, row in found.items() if row["is_whole"]]
    architecture = "cpu" if dry else "sm_" + machine["capability"].replace(".", "")
    # What another machine measured says nothing of this one.
    is_same = before.get("architecture") == architecture and bool(before.get("dry")) == dry
    runs, entries = (before.get("runs", []), dict(before["entries"])) if is_same else ([], {})
    about = {key: machine[key] for key in ("gpu", "date", "commit", "torch", "triton")}
    for operation, row in found.items():
        new, kept = row["entries"], []
        if not row["is_whole"]:
            keys = [entry["key"] for entry in new]
            kept = [old for old in entries.get(operation, []) if old["key"] not in keys]
        entries[operation] = [*kept, *new]
    entries = {name: entries[name] for name in SWEPT if entries.get(name)}
    document = {
        "architecture": architecture,
        "runs": [*runs, about | {"operations": swept}],
        "entries": entries,
    }
    return document | ({"dry": True} if dry else {})


def _before(out: Path) -> dict[str, Any]:
    """What an earlier sweep wrote. Raises SystemExit for another file, which is left as it is."""
    what = f"sweep.py: --out {out}: not a file of measured entries"
    try:
        document = json.loads(out.read_text())
    except ValueError as error:
        raise SystemExit(f"{what}: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("entries"), dict):
        raise SystemExit(f"{what}: no `entries`")
    return document


class SweepFile(RowFile):
    """The rows of a sweep, and beside them the file of measured entries, which is written as often
    as there are new ones: whatever ends the run, they are there.

    Args:
        out: the file, NAME.json. The rows go to NAME.jsonl, behind those of earlier sweeps.
    """

    def __init__(self, out: Path, *, dry: bool) -> None:
        self.out, self.dry = out, dry
        self.before = _before(out) if out.exists() else {}
        super().__init__(out.with_suffix(".jsonl"), keeps=True)

    def append(self, row: Row) -> None:
        super().append(row)
        if "entries" in row:
            self.write()

    def write(self) -> dict[str, Any]:
        document = document_of(self.rows, self.before, dry=self.dry)
        beside = self.out.with_suffix(".partial")
        beside.write_text(json.dumps(document, indent=1) + "\n")
        beside.replace(self.out)
        return document


def main() -> int:
    options = _options()
    if not (options.dry or list(Path("/dev").glob("nvidia*")) or shutil.which("nvidia-smi")):
        raise SystemExit("sweep.py: no NVIDIA GPU here; --dry runs all of it on the CPU")
    out = options.out or BUILD / ("tuned-dry.json" if options.dry else NAME)
    # OUT is a folder for `make gpu`, also where the environment has it, and may not be there yet.
    if out.is_dir() or not out.suffix:
        out /= NAME
    if out.suffix == ".jsonl":
        raise SystemExit(f"sweep.py: --out {out}: that is where the rows go; name a .json")
    chosen = phases(words(options.only), dry=options.dry, cpus=os.cpu_count() or 1)
    end_with_make()
    rows = SweepFile(out, dry=options.dry)
    scratch, cache = BUILD / "scratch-tune", BUILD / "cache"
    runner = Runner(rows, scratch, cache, dry=options.dry, budget=options.budget)

    def sweep() -> None:
        runner.run(chosen[:1])
        document_of(rows.rows, rows.before, dry=options.dry)  # or there is nothing to write it as
        runner.run(chosen[1:])

    guarded(runner, sweep)
    count = sum(map(len, rows.write()["entries"].values()))
    use = "refuse it, of a dry run" if options.dry else f"read it: NANOTRON_FAST_MEASURED={out}"
    print(f"{count} entries in {out}; kernels {use}")
    return 1 if failures(rows.rows) else 0
