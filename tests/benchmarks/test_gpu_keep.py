"""What a run on a GPU has found becomes files that the report reads."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.keep import documents, keep
from benchmarks.gpu.main import row_file

_TIMES = {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0}
_VERSIONS = {"kind": "machine", "operation": "versions", "ok": True, "gpu": "NVIDIA H200"}
_CEILINGS = {
    "kind": "machine",
    "operation": "ceilings",
    "ok": True,
    "copy_gb_per_s": 4300.0,
    "matmul_tflop_per_s": 780.0,
}
_RATIO = {"kind": "ratio", "operation": "glu", "shape": "8x8", "variant": "ours", "ok": True}
_STEP = {"kind": "step", "operation": "1B, 4k tokens", "variant": "ours", "ok": True}


def _rows() -> list[dict[str, Any]]:
    figures = _TIMES | {"phase": "forward", "gb_per_s": 4000.0, "fraction_of_ceiling": 0.93}
    step = _TIMES | {"tokens_per_s": 9.0, "mfu": 0.5, "peak_memory_gb": 3.5}
    return [
        _VERSIONS | {"commit": "1234567", "job": "machine versions"},
        _CEILINGS,
        _RATIO | figures,
        _RATIO | {"variant": "quack", "ok": None, "note": "quack is not there"},
        {"kind": "ratio", "operation": "clip", "variant": "ours", "ok": False, "error": "killed"},
        _STEP | step,
        _STEP | {"operation": "1.1B", "mfu": 0.5},
    ]


def test_the_report_reads_what_is_kept(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2] / "benchmarks")])
    import report

    (tmp_path / "results").mkdir()
    lines = [json.dumps(row) + "\n" for row in _rows()]
    (tmp_path / "gpu.jsonl").write_text("".join(lines))
    again = [_VERSIONS | {"commit": "1234567"}, _CEILINGS, _rows()[2] | {"p50_ms": 1.5}]
    (tmp_path / "gpu-again.jsonl").write_text("".join(json.dumps(row) + "\n" for row in again))
    paths = keep(tmp_path, tmp_path / "results")
    assert [path.name for path in paths] == ["kernels.json", "train.json"]
    kernels, train = ("\n".join(report.read(path).lines) for path in paths)
    assert "Measured: gpu NVIDIA H200, commit 1234567." in kernels
    assert "device copy 4300 GB/s" in kernels
    assert "| 1.5 " in kernels  # of the second time
    assert "| 2.0 " not in kernels
    assert "quack is not there" in kernels
    assert "| 50.0% |" in train
    assert "1.1B" not in train


def test_all_that_was_taken_again_counts_until_the_next_whole_run(tmp_path: Path) -> None:
    """As what was left out, and compute-sanitizer after it."""

    def run(name: str, p50_ms: float, variant: str = "ours") -> list[tuple[str, float]]:
        words = dict.fromkeys(("profile", "sanitize", "only", "phases"), "")
        options = Namespace(out=tmp_path, dry=False, again=True, **words)  # with no copy
        file = row_file(options, name)
        for row in (_VERSIONS, _CEILINGS, _rows()[2] | {"variant": variant, "p50_ms": p50_ms}):
            file.append(row)
        keep(tmp_path, tmp_path)
        rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
        return [(row["variant"], row["p50_ms"]) for row in rows]

    assert run("gpu.jsonl", 4.0) == [("ours", 4.0)]
    assert run("gpu-again.jsonl", 3.0) == [("ours", 3.0)]
    assert run("gpu-again.jsonl", 2.0, "liger") == [("ours", 3.0), ("liger", 2.0)]
    assert run("gpu.jsonl", 1.0) == [("ours", 1.0)]


def test_what_is_compared_stands_together() -> None:
    """A run times ours everywhere first, and what is beside it later."""
    ours = _rows()[2]
    rope, quack = ours | {"operation": "rope"}, {"variant": "quack"}
    backward = quack | {"phase": "backward"}
    run = [*_rows()[:2], ours, rope, ours | backward, ours | quack, rope | quack]
    rows = documents(run)["kernels.json"]["rows"]
    told = [(row["operation"], row["phase"], row["variant"]) for row in rows]
    assert told == [
        ("glu", "forward", "ours"),
        ("glu", "forward", "quack"),
        ("glu", "backward", "quack"),
        ("rope", "forward", "ours"),
        ("rope", "forward", "quack"),
    ]


def test_a_failure_that_is_mended_is_not_kept() -> None:
    failed = _RATIO | {"ok": False, "error": "off"}
    backward = _rows()[2] | {"phase": "backward"}
    rows = documents([*_rows()[:2], failed, _rows()[2], backward])["kernels.json"]["rows"]
    assert [row.get("phase") for row in rows] == ["forward", "backward"]
    # But one that comes after it, as that of a backward pass, is.
    rows = documents([*_rows()[:3], failed])["kernels.json"]["rows"]
    assert [row["ok"] for row in rows] == [True, False]


@pytest.mark.parametrize("lacking", [0, 1])
def test_rows_of_no_gpu_are_refused(lacking: int) -> None:
    rows = _rows()
    del rows[lacking]
    with pytest.raises(SystemExit, match="no versions or no ceilings"):
        documents(rows)
    dry = {"kind": "machine", "operation": "dry run", "ok": None, "note": ""}
    with pytest.raises(SystemExit, match="dry run"):
        documents([*_rows(), dry])
