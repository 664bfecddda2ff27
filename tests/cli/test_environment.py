"""`nanotron-fast env`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest


def env(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nanotron_fast", "env", *words],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables,
    )


def test_says_what_each_operation_does_and_why() -> None:
    document = json.loads(env("--json").stdout)
    assert document["versions"]["torch"] != "not installed"
    operations = document["operations"]
    for name in ("rms_norm", "attention", "pack", "adamw_step_", "matmul_glu, matmul_rope"):
        assert operations[name]["path"]
        assert operations[name]["reason"]
    if not document["devices"]:
        assert operations["rms_norm"] == {"path": "torch", "reason": "tensors on cpu"}


def test_a_variable_shows_and_decides() -> None:
    result = env(NANOTRON_FAST_BACKEND="triton", TRITON_INTERPRET="1")
    assert "NANOTRON_FAST_BACKEND=triton" in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if line.strip().startswith("rms_norm")]
    assert line.split()[1] == "triton"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NANOTRON_FAST_BACKEND", "choose auto, triton, torch"),
        ("NANOTRON_FAST_SIMD", "choose scalar"),
    ],
)
def test_a_value_that_cannot_be_is_named(name: str, message: str) -> None:
    result = env(**{name: "fast"})
    assert result.returncode == 2
    assert f"{name}=fast: {message}" in result.stderr
    assert "Traceback" not in result.stderr


def test_says_why_the_drop_in_is_off() -> None:
    if importlib.util.find_spec("nanotron") is not None:
        pytest.skip("nanotron is installed here: tests/nanotron looks at its targets")
    drop_in = json.loads(env("--json").stdout)["drop_in"]
    assert drop_in["nanotron"]["state"] == "off"
    assert "pip install nanotron" in drop_in["nanotron"]["reason"]
