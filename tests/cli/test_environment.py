"""`nanotron-fast env`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from nanotron_fast.cli.commands import app


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """What a process of its own says, whose kernels are not interpreted."""
    result = subprocess.run(
        [sys.executable, "-m", "nanotron_fast", "env", "--json"],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)


def test_says_what_each_operation_does_and_why(document: dict[str, Any]) -> None:
    assert document["versions"]["torch"] != "not installed"
    operations = document["operations"]
    for name in ("rms_norm", "attention", "pack", "adamw_step_", "matmul_glu, matmul_rope"):
        assert operations[name]["path"]
        assert operations[name]["reason"]
    if not document["devices"]:
        assert operations["rms_norm"] == {"path": "torch", "reason": "tensors on cpu"}


def test_a_variable_shows_and_decides(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "triton")
    app(["env"], standalone_mode=False)
    out = capsys.readouterr().out
    assert "NANOTRON_FAST_BACKEND=triton" in out
    (line,) = [line for line in out.splitlines() if line.strip().startswith("rms_norm")]
    assert line.split()[1] == "triton"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NANOTRON_FAST_BACKEND", "choose auto, triton, torch"),
        ("NANOTRON_FAST_SIMD", "choose scalar"),
    ],
)
def test_a_value_that_cannot_be_is_named(
    name: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, "fast")
    with pytest.raises(SystemExit) as ended:
        app(["env"])
    assert ended.value.code == 2
    assert f"{name}=fast: {message}" in capsys.readouterr().err


def test_says_why_the_drop_in_is_off(document: dict[str, Any]) -> None:
    if importlib.util.find_spec("nanotron") is not None:
        pytest.skip("nanotron is installed here: tests/nanotron looks at its targets")
    drop_in = document["drop_in"]
    assert drop_in["nanotron"]["state"] == "off"
    assert "pip install nanotron" in drop_in["nanotron"]["reason"]
