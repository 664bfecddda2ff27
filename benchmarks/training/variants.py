"""What is timed on a GPU, in order: names and processes alone, without torch."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

ANCHOR, OURS = "transformers, SDPA", "ours"
LIGER, COMPILED = "transformers, Liger", "transformers, torch.compile"
# A variant and the packages that it needs. Ours takes its weights from transformers' model.
# Nanotron's are its own trainer's step.
NEEDS: Mapping[str, tuple[str, ...]] = {
    ANCHOR: ("transformers",),
    OURS: ("transformers",),
    LIGER: ("transformers", "liger_kernel"),
    COMPILED: ("transformers",),
    "Nanotron": ("nanotron",),
    "Nanotron, drop-in": ("nanotron",),
}
ROW_SECONDS = 120.0
# In bf16, of weights that are the same (of Nanotron: of the same spread).
_LOSS_TOLERANCE, _NORM_TOLERANCE = 0.02, 0.05
Row = dict[str, Any]


def lacking(variant: str) -> str:
    """A note of what a variant needs and is not here; empty where nothing is missing."""
    missing = [name for name in NEEDS[variant] if find_spec(name) is None]
    return f"{missing[0]} is not installed" if missing else ""


def selected(settings: Sequence[str], words: Sequence[str]) -> list[tuple[str, str]]:
    """Settings and variants whose names together have each of the words in them, in order.

    First transformers and ours of every setting, then all others.
    """
    first = [(setting, variant) for setting in settings for variant in (ANCHOR, OURS)]
    rest = [
        (setting, variant)
        for variant in NEEDS
        for setting in settings
        if variant not in (ANCHOR, OURS)
    ]
    return [
        pair
        for pair in [*first, *rest]
        if all(word.lower() in " ".join(pair).lower() for word in words)
    ]


def run(
    command: Sequence[str], pairs: Sequence[tuple[str, str]], *, dry: bool, budget: float
) -> Iterator[Row]:
    """The rows, one after the other, each by a process that is given a setting and a variant.

    Rows for which no time is left are said to be left out.
    """
    ends = time.monotonic() + budget
    anchors: dict[str, Row] = {}
    for setting, variant in pairs:
        left = ends - time.monotonic()
        about: Row = {"kind": "step", "operation": setting, "variant": variant}
        if left < 5:
            yield about | {"ok": None, "note": f"left out: the {budget:.0f} s are over"}
            continue
        row = about | _row([*command, setting, variant], dry=dry, limit=min(ROW_SECONDS, left))
        if variant == ANCHOR:
            anchors[setting] = row
        yield checked(row, anchors.get(setting, {}))


def checked(row: Row, anchor: Row) -> Row:
    """The row, or without its times if its first step is another than the anchor's."""
    if not (row["ok"] and anchor.get("ok")):
        return row
    for name, tolerance in (("first_loss", _LOSS_TOLERANCE), ("first_norm", _NORM_TOLERANCE)):
        ours, wanted = row[name], anchor[name]
        if ours is not None and not abs(ours - wanted) <= tolerance * abs(wanted):
            about = {key: row[key] for key in ("kind", "operation", "variant")}
            error = f"{name} {ours:.6g}, transformers has {wanted:.6g}: it is not timed"
            return about | {"ok": False, "error": error}
    return row


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each row, with its speed as a ratio to the anchor's in the same setting."""
    yield f"{'':46}{'p50 ms':>10}{'tokens/s':>10}{'ratio':>7}{'MFU':>7}{'peak GB':>9}"
    anchors = {row["operation"]: row for row in rows if row["variant"] == ANCHOR}
    for row in rows:
        name = f"{row['operation']:16}{row['variant']:30}"
        if not row["ok"]:
            yield f"{name}  {row.get('note') or row['error']}"
            continue
        anchor = anchors.get(row["operation"], {})
        ratio = row["tokens_per_s"] / anchor["tokens_per_s"] if anchor.get("ok") else None
        cells = (f"{row['p50_ms']:10.1f}", f"{row['tokens_per_s']:10.0f}")
        shares = ("" if ratio is None else f"{ratio:.2f}x", f"{row['mfu'] or 0:.1%}")
        yield f"{name}{''.join(cells)}{shares[0]:>7}{shares[1]:>7}{row['peak_memory_gb']:9.2f}"


def _row(command: Sequence[str], *, dry: bool, limit: float) -> Row:
    environment = dict(os.environ)
    if dry:
        environment |= {
            "TRITON_INTERPRET": "1",
            "NANOTRON_FAST_BACKEND": "triton",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": f"not done after {limit:.0f} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()
        end = said[-1] if said else "nothing on stderr"
        return {"ok": False, "error": f"it ended with code {done.returncode}: {end}"}
    found: Row = json.loads(lines[-1])
    return found
