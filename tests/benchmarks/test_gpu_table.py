"""What a person reads at the end of a run."""

from __future__ import annotations

from benchmarks.gpu.rows import Row
from benchmarks.gpu.table import table


def _ratio(operation: str, variant: str, **others: object) -> Row:
    row: Row = {"kind": "ratio", "operation": operation, "shape": "8192 rows of 4096 in bf16"}
    times = {"phase": "forward", "p20_ms": 1.0, "p50_ms": 1.5, "p80_ms": 2.0, "method": "graph"}
    floors = {"gb_per_s": 2345.6, "fraction_of_ceiling": 0.7891, "times_as_fast": 1.234}
    return row | {"variant": variant, "ok": True, "path": "triton"} | times | floors | others


def test_how_much_faster_and_on_which_gpu_is_in_sight() -> None:
    gpu = {"kind": "machine", "operation": "versions", "ok": True}
    gpu |= {f"package_{i}": "1.2.3.4.5" for i in range(20)} | {"gpu": "NVIDIA H100 80GB HBM3"}
    shown = table([gpu, _ratio("adamw", "ours, of a name that is long enough to be cut off")])
    assert "gpu NVIDIA H100 80GB HBM3" in shown
    assert "times_as_fast 1.234" in shown
    assert "p50_ms 1.5" in shown


def test_what_is_compared_stands_side_by_side() -> None:
    """The first case of each operation comes before the peers and the second case of any."""
    rows = [
        _ratio("glu", "torch"),
        _ratio("rope", "torch"),
        _ratio("glu", "torch", phase="backward"),
        _ratio("rope", "ours"),
        _ratio("glu", "ours", shape="other"),
        _ratio("glu", "ours"),
        _ratio("glu", "ours", phase="backward"),
    ]
    lines = [line.split() for line in table(rows).splitlines() if line.startswith("  ok")]
    found = [(words[1], words[2], words[words.index("phase") + 1].strip(",")) for words in lines]
    assert found == [
        ("glu", "torch", "forward"),
        ("glu", "ours", "forward"),
        ("glu", "torch", "backward"),
        ("glu", "ours", "backward"),
        ("glu", "ours", "forward"),
        ("rope", "torch", "forward"),
        ("rope", "ours", "forward"),
    ]


def test_failures_of_every_kind_come_last() -> None:
    check = {"kind": "check", "operation": "pack", "variant": "cuda qkv", "ok": False}
    failed = {"ok": False, "error": "exit code 1\nRuntimeError: no such kernel"}
    rows = [_ratio("glu", "ours") | failed, _ratio("rope", "ours"), check | {"error": "unequal"}]
    *_, heading, first, second, last = table(rows).splitlines()
    assert heading == "failed"
    assert first.split()[:3] == ["FAILED", "glu", "ours"]
    assert first.endswith("exit code 1: RuntimeError: no such kernel")
    assert second.endswith("unequal")
    assert last == "3 rows, 2 failed"


def test_what_a_sweep_keeps_is_counted() -> None:
    entries = [{"key": {"cols": 64}, "config": {"block": 32}, "times_as_fast": 1.1}]
    row = {"kind": "tune", "operation": "glu_forward", "ok": True, "entries": entries}
    timed = {"kind": "tune", "operation": "glu_forward", "ok": True, "config": "a block of 32"}
    so_far, whole = ({"is_whole": is_whole} for is_whole in (False, True))
    shown = table([timed, row | so_far | {"entries": []}, row | whole])
    assert "a block of 32" in shown
    assert "0 entries kept" not in shown
    assert "1 entries kept\n" in shown
    assert "1 entries kept, of a part of the cases" in table([row | so_far])
