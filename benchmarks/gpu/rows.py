"""The rows of a result: JSON lines, appended one whole line at a time and synced to disk.

Every row has `kind` (machine, check, ratio, step, test or tune), `operation`, `ok` (true, false, or
null for what was left out, with a `note` that says why), and figures; a failure has `error`.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
KINDS = ("machine", "check", "ratio", "step", "test", "tune")
# Where a job's process writes its rows; the runner sets it.
ROWS_VARIABLE = "NANOTRON_FAST_ROWS"


class RowFile:
    """Appends rows to files. A line is one write, so whatever is cut off ends with a whole line.

    What the files had before is gone, or stays with `keeps`.
    """

    def __init__(self, *paths: Path, keeps: bool = False) -> None:
        self.rows: list[Row] = []
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (0 if keeps else os.O_TRUNC)
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._files = [os.open(path, flags, 0o644) for path in paths]

    def append(self, row: Row) -> None:
        self.rows.append(row)
        line = (json.dumps(row, default=str) + "\n").encode()
        for file in self._files:
            os.write(file, line)
            os.fsync(file)


def emit(row: Row) -> None:
    """Hands a row of this process over to the runner."""
    line = (json.dumps(row, default=str) + "\n").encode()
    file = os.open(os.environ[ROWS_VARIABLE], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(file, line)
    os.close(file)


class Tail:
    """The whole lines that were appended to a file since the last look."""

    def __init__(self, path: Path) -> None:
        self.path, self._offset = path, 0

    def __call__(self) -> list[Row]:
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def read_rows(path: Path) -> list[Row]:
    """Those of a file that has ended. Raises SystemExit where a line is none."""
    try:
        return Tail(path)()
    except ValueError as error:
        raise SystemExit(f"{path}: not a file of rows: {error}") from error


def set_aside(path: Path) -> Path | None:
    """Renames a file with rows to NAME.1.jsonl, or the next number that is free: its new path.

    Time on a GPU is rare, and what it gave is not written over.
    """
    if not path.exists() or path.stat().st_size == 0:
        return None
    names = (path.with_suffix(f".{number}{path.suffix}") for number in itertools.count(1))
    free = next(name for name in names if not name.exists())
    return path.rename(free)


def failures(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.get("ok") is False]
