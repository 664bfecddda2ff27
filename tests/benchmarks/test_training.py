"""The benchmark of whole training steps: what it counts, compares, and says when it cannot."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.training import cpu, variants
from benchmarks.training import row as rows
from benchmarks.training.shapes import SETTINGS, SMALL, tiny
from benchmarks.training.variants import ANCHOR, NEEDS, OURS, checked, run, selected, table
from nanotron_fast.train.architecture import architecture
from nanotron_fast.train.config import TrainingConfig
from nanotron_fast.train.estimate import estimate
from tests.train.configs import DOCUMENT

SETTING = "3B, 8k tokens"


def test_parameters_and_flops_are_those_of_a_dry_run() -> None:
    for shape in (SMALL, *SETTINGS.values()):
        model = {
            **shape.config,
            "is_llama_config": True,
        }
        del model["use_cache"]
        tokens = {
            **DOCUMENT["tokens"],
            "sequence_length": shape.length,
            "micro_batch_size": shape.rows,
            "batch_accumulation_per_replica": shape.micro_batches,
        }
        document = {
            **DOCUMENT,
            "model": {**DOCUMENT["model"], "model_config": model},
            "tokens": tokens,
        }
        config = TrainingConfig.from_dict(document)
        found = estimate(config, architecture(config))
        assert (found.parameters, found.flops_per_step) == (shape.parameters, shape.flops)


def test_both_sides_take_the_same_steps_on_a_cpu() -> None:
    result = cpu.compare(tiny(replace(SMALL, length=4096)), rounds=2)
    assert len(result["ratios"]) == 2
    assert all(ratio > 0 for ratio in result["ratios"])


@pytest.mark.parametrize("which", [0, 1])
def test_sides_that_disagree_have_no_time(which) -> None:
    wrong = [9.5, 2.5]
    wrong[which] *= 1.002
    with pytest.raises(SystemExit, match=r"step 3: loss 9\.5"):
        cpu.check({cpu.OURS: (wrong[0], wrong[1]), cpu.THEIRS: (9.5, 2.5)}, 3)


def test_a_row_has_what_a_gpu_is_asked_for(monkeypatch) -> None:
    monkeypatch.delenv("NANOTRON_FAST_BACKEND", raising=False)
    ours, anchor = (rows.row(SETTING, name, dry=True) for name in (OURS, ANCHOR))
    for row in (ours, anchor):
        assert row["ok"] is True
        assert row["tokens_per_s"] > 0
        assert row["peak_memory_gb"] > 0
        assert row["mfu"] is None  # nobody knows what a CPU could do
    assert checked(ours, anchor) is ours
    for name, error in (("first_loss", 0.03), ("first_norm", 0.06)):
        row = checked({**ours, name: ours[name] * (1 + error)}, anchor)
        assert row["ok"] is False
        assert "p50_ms" not in row
        assert name in row["error"]
    lines = [*table([anchor, ours, row])]
    assert len(lines) == 4
    assert "it is not timed" in lines[-1]


def test_a_row_that_runs_out_of_memory_says_so(monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rows, "_measured", fails)
    row = rows.row(SETTING, OURS, dry=True)
    assert (row["ok"], row["note"]) == (None, "out of memory")


def test_what_is_not_installed_is_named(monkeypatch) -> None:
    monkeypatch.setattr(variants, "find_spec", lambda name: None)
    for variant, packages in NEEDS.items():
        row = rows.row(SETTING, variant, dry=True)
        assert (row["ok"], row["note"]) == (None, f"{packages[0]} is not installed")


def test_ours_and_transformers_come_first() -> None:
    pairs = selected(list(SETTINGS), [])
    assert {variant for _, variant in pairs[:8]} == {ANCHOR, OURS}
    assert len(set(pairs)) == len(pairs) == len(SETTINGS) * len(NEEDS)
    assert selected(list(SETTINGS), ["liger", "3b, 8k"]) == [(SETTING, "transformers, Liger")]
    assert selected(list(SETTINGS), ["ligr"]) == []


def test_a_process_that_fails_is_a_row_and_no_end(tmp_path: Path) -> None:
    script = tmp_path / "row.py"
    script.write_text(
        "import sys, time\n"
        "print('{\"ok\": true}') if sys.argv[2] == 'ours' else sys.exit('no such kernel')\n"
    )
    pairs = [(SETTING, ANCHOR), (SETTING, OURS)]
    command = [sys.executable, str(script)]
    failed, passed = run(command, pairs, dry=True, budget=60)
    assert failed["error"] == "it ended with code 1: no such kernel"
    assert passed["ok"] is True
    late = [*run([sys.executable, "-c", "import time; time.sleep(9)"], pairs, dry=True, budget=5.2)]
    assert late[0]["error"] == "not done after 5 s"
    assert late[1]["note"] == "left out: the 5 s are over"


def test_the_report_has_tables_of_both(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(cpu.__file__).parents[1])])
    import report

    sides = [
        {"name": name, "process_seconds": 2.0, "clock_seconds": 1.5}
        for name in (cpu.OURS, cpu.THEIRS)
    ]
    found = {"parameters_m": 100.1, "tokens": 64, "threads": 2, "ratio": 0.9, "ratios": [0.8, 1.0]}
    timed = {"p20_ms": 1.0, "p50_ms": 1.0, "p80_ms": 1.0, "tokens_per_s": 9.0, "mfu": 0.5}
    about = {"operation": SETTING, "variant": OURS}
    steps = [
        about | timed | {"ok": True, "peak_memory_gb": 3.5},
        about | {"ok": None, "note": "out of memory"},
    ]
    for name, document in (
        ("train-cpu", {"training": [found | {"sides": sides, "threads": n} for n in (1, 2)]}),
        ("train", {"steps": steps}),
    ):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"environment": {"cpus": 2}, **document}))
        lines = "\n".join(report.read(path).lines)
        assert lines.count("0.90 of the other's") == (2 if name == "train-cpu" else 0)
        assert ("50.0%" in lines and "out of memory" in lines) == (name == "train")
