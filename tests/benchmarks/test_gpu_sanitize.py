"""compute-sanitizer over our kernels: what it is asked, and what is made of its answers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import jobs, sanitize
from benchmarks.gpu.context import Context, Small
from benchmarks.gpu.launches import counted
from benchmarks.gpu.rows import ROWS_VARIABLE, read_rows

_FINDING = "========= Invalid __global__ write of size 2 bytes"


@pytest.mark.parametrize(
    ("code", "said", "ok", "told"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", True, "0 errors"),
        (97, f"a line of torch's\n{_FINDING}\n=========     at forward_kernel", False, _FINDING),
        (1, "Error: Device not supported", None, "code 1: Error: Device not supported"),
    ],
)
def test_what_the_tool_says_is_a_row(
    code: int, said: str, ok: bool | None, told: str, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "said").write_text(said)
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho $* > {tmp_path}/asked\ncat {tmp_path}/said\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv(ROWS_VARIABLE, str(tmp_path / "rows"))
    sanitize.run("glu", "", Context())
    (row,) = read_rows(tmp_path / "rows")
    assert row["ok"] is ok
    assert (row.get("error") or row["note"]).startswith(told) or told in row["note"]
    assert "torch's" not in row.get("error", "")
    asked = (tmp_path / "asked").read_text().split()
    assert asked[asked.index("--error-exitcode") + 1] == "97"
    assert asked[asked.index(sys.executable) :][2:] == ["--target", "launch", "glu", "all"]


def test_without_the_tool_nothing_has_failed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(ROWS_VARIABLE, str(tmp_path / "rows"))
    for context in (Context(), Context(dry=True)):
        sanitize.run("glu", "", context)
    assert [row["ok"] for row in read_rows(tmp_path / "rows")] == [None, None]


def test_kernels_are_launched_in_tiny_shapes_on_the_gpu(monkeypatch) -> None:
    assert (Small().device.type, Small().size(4096, 7)) == ("cuda", 7)
    assert Small().dtype(multiplies=True) is torch.bfloat16
    if not torch.cuda.is_available():
        monkeypatch.setenv("NANOTRON_FAST_BACKEND", "triton")
        monkeypatch.setattr(sanitize, "Small", lambda: Context(dry=True))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with counted() as kernels:
        sanitize.launch("glu")
    assert kernels == {"glu._forward_kernel": 3, "glu._backward_kernel": 3}


def test_every_operation_with_kernels_is_looked_at() -> None:
    without = {name for name in jobs.OPERATIONS if not jobs.variants_of_ours(name)}
    assert without == {"column_linear", "row_linear"}
    assert jobs.variants_of_ours("pack") == ("triton qkv", "triton transpose")
    assert "sdpa_cudnn dense" not in jobs.variants_of_ours("attention")
    assert jobs.variants_of_ours("clip") == jobs.CHECKS["clip"][1]
