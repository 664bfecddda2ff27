"""What a plan makes, and of what: the same for all processes and runs that may share the work."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanotron_fast.checkpoints.plan.plan import Plan
from nanotron_fast.checkpoints.remote.mirror import shown
from nanotron_fast.formats.plain_file import digest_whole
from nanotron_fast.moves.files import FileState, ReadFile
from nanotron_fast.moves.move import scales_of, table_of


@dataclass(frozen=True, slots=True)
class Source:
    """A file that is read: its bytes, when it was written in ns since 1970, its header's digest.

    Of a small file the digest is of all of it, and the time, which says no more, is 0.
    """

    size: int
    mtime_ns: int
    header: str


@dataclass(frozen=True, slots=True)
class Made:
    """What a run makes.

    Args:
        layout: a digest of every output and every move.
        choices: what tells one plan from another in words: topology, dtype and so on.
        sources: by path.
    """

    layout: str
    choices: Mapping[str, Any]
    sources: Mapping[str, Source]

    @property
    def digest(self) -> str:
        """Of all of it."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """As a journal holds it."""
        return {
            "layout": self.layout,
            "choices": dict(self.choices),
            "sources": {
                path: [each.size, each.mtime_ns, each.header] for path, each in self.sources.items()
            },
        }

    @classmethod
    def parse(cls, document: object) -> Made | None:
        """What `to_json` gave; None where it is something else."""
        if not isinstance(document, dict):
            return None
        try:
            sources = {
                str(path): Source(int(size), int(mtime_ns), str(header))
                for path, (size, mtime_ns, header) in document["sources"].items()
            }
            return cls(str(document["layout"]), dict(document["choices"]), sources)
        except (TypeError, KeyError, ValueError, OverflowError, AttributeError):
            return None

    def difference(self, other: Made, *, mine: str, others: str) -> str | None:
        """The first thing in which they differ, in words; None where nothing does.

        Args:
            mine, others: what to call the two: "now", "then".
        """
        for path in sorted({*self.sources, *other.sources}):
            a, b = self.sources.get(path), other.sources.get(path)
            if a is None or b is None:
                return f"{path} is read {mine if b is None else others} alone"
            if a.size != b.size:
                return f"{path} has {a.size:,} bytes {mine}, and {b.size:,} {others}"
            if a.mtime_ns != b.mtime_ns:
                return (
                    f"{path} was written at {_time(a.mtime_ns)} {mine}, and at "
                    f"{_time(b.mtime_ns)} {others}"
                )
            if a.header != b.header and a.mtime_ns == 0:
                return f"{path} holds something else {mine} than {others}"
            if a.header != b.header:
                return f"{path} has another header {mine} than {others}"
        for key in {**self.choices, **other.choices}:
            first, second = self.choices.get(key), other.choices.get(key)
            if first != second:
                return f"{key} is {first} {mine}, and {second} {others}"
        if self.layout != other.layout:
            return "the layout of the files"
        return None


def _time(mtime_ns: int) -> str:
    seconds, rest = divmod(mtime_ns, 10**9)
    try:
        return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))}.{rest:09}"
    except (ValueError, OverflowError, OSError):  # no year that can be told
        return f"{mtime_ns} ns since 1970"


def states_of(plan: Plan) -> dict[Path, ReadFile]:
    """What all that a plan is made from was when it was read, or is now where that was not noted.

    Those are the files of tensors, the small ones beside them, and what is copied as it is. Raises
    CheckpointError, OSError.
    """
    found = dict(plan.sources_read)
    for path in plan.transfer.sources:
        if path not in found:
            found[path] = ReadFile(FileState.of(os.stat(path)), "")
    for path in plan.copies.values():
        if path not in found or not found[path].is_whole:
            found[path] = digest_whole(path)
    return found


def made_by(plan: Plan, states: Mapping[Path, ReadFile]) -> Made:
    """What a plan makes.

    Args:
        states: of its sources, as `states_of` found them.
    """
    layout = hashlib.sha256()
    for output in plan.transfer.outputs:
        layout.update(json.dumps([output.path, output.size_bytes]).encode())
        for offset, literal in ((0, output.header), *output.literals):
            layout.update(f"{offset} {len(literal)} ".encode())
            layout.update(literal)
    for table in (table_of(plan.transfer.moves), scales_of(plan.transfer.moves)):
        layout.update(memoryview(table).cast("B"))
    sources = {
        shown(path): Source(
            read.state.size_bytes,
            0 if read.is_whole else read.state.mtime_ns,
            read.header_digest,
        )
        for path, read in states.items()
    }
    return Made(layout.hexdigest(), _choices(plan), sources)


def _choices(plan: Plan) -> dict[str, Any]:
    topology = plan.topology
    return {
        "format": plan.direction,
        "family": plan.family,
        "class": plan.model_class,
        "tp": topology.tp,
        "pp": topology.pp,
        "ep": topology.ep,
        "dtype": plan.dtype.short_name,
        "parameters": plan.num_parameters,
        "files": len(plan.transfer.outputs),
        "small files": sorted((*plan.documents, *plan.copies)),
    }
