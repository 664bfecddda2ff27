"""The table that ends a run, made from its rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from benchmarks.gpu.rows import Row, failures

_MARKS = {True: "ok", False: "FAILED", None: "left out"}
# Shown before all else: what is behind the end of a line is in the rows alone.
_FIRST = ("times_as_fast", "p50_ms", "phase", "shape", "config", "fraction_of_ceiling")
_MOST_CHARACTERS = 180
_HIDDEN = (
    "kind",
    "operation",
    "variant",
    "ok",
    "error",
    "note",
    "path",
    "seconds",
    "kernels",
    "job",
    "is_whole",
)


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _figures(row: Row) -> str:
    simple = (int, float, str)
    first = {key: row[key] for key in _FIRST if key in row}
    named = [
        f"{key} {_figure(value)}"
        for key, value in (first | row).items()
        if key not in _HIDDEN and isinstance(value, simple)
    ]
    if "entries" in row:
        of = "" if row["is_whole"] else ", of a part of the cases"
        named.append(f"{len(row['entries'])} entries kept{of}")
    for name, took, calls in row.get("top_kernels", [])[:4]:
        named.append(f"{name[:24]} {took:.3g} ms / {calls}")
    end = row.get("error", "").strip().splitlines()
    if row["ok"] is False:
        return f"{end[0]}: {end[-1]}" if len(end) > 1 else "".join(end)
    return ", ".join(named + ([row["note"]] if "note" in row else []))


def line(row: Row) -> str:
    name = " ".join(filter(None, (row["operation"], row.get("variant", ""))))
    where = row.get("path", "")
    whole = f"  {_MARKS[row['ok']]:8} {name:44} {where:10} {_figures(row)}"
    return whole if row["kind"] == "machine" else whole[:_MOST_CHARACTERS]


def _side_by_side(rows: Iterable[Row]) -> list[Row]:
    """By operation, shape and phase, each in the order in which it came first."""
    places: dict[tuple[str, ...], int] = {}

    def place(row: Row) -> list[int]:
        names = (row["operation"], row.get("shape", ""), row.get("phase", ""))
        return [places.setdefault(names[:end], len(places)) for end in (1, 2, 3)]

    return sorted(rows, key=place)


def table(rows: Iterable[Row]) -> str:
    """Machine, ratios and steps in full, checks and tests by operation, then every failure."""
    by_kind: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    # The last entries of an operation, not those that it had so far.
    entries = {row["operation"]: row for row in by_kind["tune"] if "entries" in row}
    lines = []
    for kind in ("machine", "ratio", "step", "tune"):
        shown = _side_by_side(by_kind[kind]) if kind == "ratio" else by_kind[kind]
        shown = [row for row in shown if "entries" not in row or entries[row["operation"]] is row]
        if shown:
            lines += [kind, *map(line, shown)]
    for kind in ("check", "test"):
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        for row in by_kind[kind]:
            counts[row["operation"]][{True: 0, False: 1, None: 2}[row["ok"]]] += 1
        if counts:
            lines.append(f"{kind:52} ok failed left out")
        for operation, (passed, failed, left_out) in counts.items():
            lines.append(f"  {operation:48} {passed:4} {failed:6} {left_out:8}")
    everything = [row for rows_of_kind in by_kind.values() for row in rows_of_kind]
    failed = failures(everything)
    if failed:
        lines += ["failed", *map(line, failed)]
    lines.append(f"{len(everything)} rows, {len(failed)} failed")
    return "\n".join(lines)
