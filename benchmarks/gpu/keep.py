"""The rows of a run on a GPU as files of benchmarks/results, which `make report` reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.jobs import BESIDE
from benchmarks.gpu.rows import Row, read_rows

# Where the rows of a whole run go, and those of what is taken again after it.
WHOLE, AGAIN = "gpu.jsonl", "gpu-again.jsonl"
_CEILINGS = ("copy_gb_per_s", "matmul_tflop_per_s")
_OF_THE_ROW = ("kind", "operation", "ok", "job", "tools_absent")


def documents(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Name of a file -> what belongs into it. Of a figure that was taken twice the later one, and
    of what failed before it had one that alone.

    Raises SystemExit for rows of a dry run, and of one that knows nothing of its machine.
    """
    of_machine = {row["operation"]: row for row in rows if row["kind"] == "machine"}
    if "dry run" in of_machine:
        raise SystemExit("run_gpu.py: --keep: rows of a dry run are no figures of a GPU")
    versions, ceilings = of_machine.get("versions", {}), of_machine.get("ceilings", {})
    if not (versions.get("ok") and ceilings.get("ok")):
        raise SystemExit("run_gpu.py: --keep: the rows have no versions or no ceilings")
    about = {name: value for name, value in versions.items() if name not in _OF_THE_ROW}
    timed: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["kind"] == "ratio" and "shape" in row:
            name = (row["operation"], row["shape"], row["variant"])
            timed.pop((*name, None), None)
            timed[(*name, row.get("phase"))] = row
    # By operation and shape, and there by phase: what is compared stands together.
    places: dict[tuple[Any, ...], int] = {}
    for operation, shape, _, phase in timed:
        for place in ((operation, shape), (operation, shape, phase)):
            places.setdefault(place, len(places))
    compared = sorted(timed, key=lambda key: (places[key[:2]], places[(*key[:2], key[3])]))
    steps = {
        (row["operation"], row["variant"]): row
        for row in rows
        if row["kind"] == "step" and row["operation"] in BESIDE
    }
    found: dict[str, dict[str, Any]] = {
        "kernels.json": {
            "environment": about,
            "ceilings": {name: ceilings[name] for name in _CEILINGS},
            "rows": [timed[key] for key in compared],
        }
    }
    if steps:
        found["train.json"] = {"environment": about, "steps": [*steps.values()]}
    return found


def keep(out: Path, results: Path) -> list[Path]:
    """Writes the rows of `make gpu`, and of `make gpu-again` after it, in `out`: the files."""
    paths = [out / name for name in (WHOLE, AGAIN)]
    if not paths[0].exists():
        raise SystemExit(f"run_gpu.py: --keep: no {paths[0]}")
    rows = [row for path in paths if path.exists() for row in read_rows(path)]
    written = []
    for name, document in documents(rows).items():
        written.append(results / name)
        written[-1].write_text(json.dumps(document, indent=1) + "\n")
    return written
