"""One changed line of a kernel is a failed check of its operation, whichever term it is in.

The changed copy of a kernel's file is loaded beside it, under other names for its operators, and
its kernels take the place of those that the operators launch.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from benchmarks.gpu.agreement import error_of, excess
from benchmarks.gpu.context import Context
from benchmarks.gpu.harness import row_of
from benchmarks.gpu.jobs import CHECKS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted here")
KERNELS = Path(__file__).resolve().parents[2] / "kernels"
_numbers = itertools.count()


def _load(
    source: str, near: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    """A module of this source, whose operators have names of their own."""
    name = f"{near.__name__}_planted_{next(_numbers)}"
    path = folder / f"{name}.py"
    path.write_text(source.replace('"nanotron_fast::', f'"planted_{next(_numbers)}::'))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def plant(file: str, old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes one line, and puts every kernel of the file in the place of the one that was."""
    text = (KERNELS / file).read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} of {old!r}"
    name = re.sub(r"/__init__$|\.py$", "", file).replace("/", ".")
    original = importlib.import_module(f"nanotron_fast.kernels.{name}")
    changed = _load(text.replace(old, new), original, folder, monkeypatch)
    kernels = {
        id(value): getattr(changed, label)
        for label, value in vars(original).items()
        if isinstance(value, InterpretedFunction) and value.fn.__module__ == original.__name__
    }
    ours = [m for n, m in sys.modules.items() if n.startswith("nanotron_fast.kernels")]
    for module in ours:
        for label, value in list(vars(module).items()):
            if id(value) in kernels:
                monkeypatch.setattr(module, label, kernels[id(value)])


FAULTS = {
    "rms_norm, eps": ("rms_norm", "rms_norm/kernels.py", "/ num_cols + eps)", "/ num_cols - eps)"),
    "glu, gradient of up": (
        *("glu", "glu.py"),
        *("(dy * activated).to(dtype)", "(-dy * activated).to(dtype)"),
    ),
    "adamw, weight decay": (
        *("adamw", "optimizer/adamw.py"),
        *(
            "    p -= (lr * weight_decay) * p\n    m +=",
            "    p += (lr * weight_decay) * p\n    m +=",
        ),
    ),
    "adamw, eps": ("adamw", "optimizer/adamw.py", "* correction2 + eps))", "* correction2 - eps))"),
    "cross_entropy, sign of z": (
        *("cross_entropy", "cross_entropy/kernels.py"),
        *("scale *= 1.0 + 2.0 * z_loss", "scale *= 1.0 - 2.0 * z_loss"),
    ),
    "cross_entropy, no z": (
        *("cross_entropy", "cross_entropy/kernels.py"),
        *("scale *= 1.0 + 2.0 * z_loss * log_z", "scale *= 1.0"),
    ),
    "cross_entropy, softmax": (
        *("cross_entropy", "cross_entropy/kernels.py"),
        *(
            "gradient = tl.exp(logits - maximum) * scale",
            "gradient = -tl.exp(logits - maximum) * scale",
        ),
    ),
    "linear_cross_entropy, softmax": (
        *("linear_cross_entropy", "cross_entropy/kernels.py"),
        *(
            "gradient = tl.exp(logits - maximum) * scale",
            "gradient = -tl.exp(logits - maximum) * scale",
        ),
    ),
}


def _rows(operation: str) -> list[dict[str, object]]:
    return [row_of(operation, name, Context(dry=True)) for name in CHECKS[operation][1]]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOTRON_FAST_BACKEND", "triton")


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_fails_its_check(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation, *change = FAULTS[name]
    plant(*change, folder=tmp_path, monkeypatch=monkeypatch)
    rows = _rows(operation)
    assert all(row["kernels"] and row["path"] == "triton" for row in rows)
    failed = [row for row in rows if row["ok"] is False]
    assert failed, rows
    assert all("off by" in str(row["error"]) for row in failed)


@pytest.mark.parametrize("operation", sorted({fault[0] for fault in FAULTS.values()}))
def test_without_a_fault_they_pass(operation: str) -> None:
    assert [row for row in _rows(operation) if row["ok"] is not True] == []


def test_the_softmax_of_a_whole_vocabulary_shows_beside_the_targets() -> None:
    """Its share of the gradient's norm is less than what bf16 rounds away."""
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(8, 128256, generator=generator).softmax(-1)
    target = torch.arange(0, 8 * 7, 7)[:, None]

    def gradient(sign: float) -> torch.Tensor:
        return (sign * probabilities).scatter_add(1, target, torch.full((8, 1), -1.0))

    right, wrong = gradient(1.0).bfloat16(), gradient(-1.0).bfloat16()
    assert excess(right, gradient(1.0).double(), {})[2] == ""
    assert error_of(wrong, gradient(1.0).double()) < 1e-2
    loose = {torch.bfloat16: 1e-2}
    assert "of its elements" in excess(wrong, gradient(1.0).double(), loose)[2]


def test_bits_that_change_from_run_to_run_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the tolerances let pass; and torch's algorithms are left as they were."""
    from benchmarks.gpu.checks.norms import BUILDERS
    from benchmarks.gpu.harness import Check

    calls = itertools.count()
    asked = []

    def changing(x: torch.Tensor) -> torch.Tensor:
        asked.append(torch.are_deterministic_algorithms_enabled())
        return x * (1 + 1e-7 * next(calls))

    def build(variant: str, context: Context) -> Check:
        return Check([torch.ones(4)], changing, lambda x: x, path="torch")

    monkeypatch.setitem(BUILDERS, "glu", build)
    row = row_of("glu", "deterministic", Context(dry=True))
    assert (row["ok"], row["error"]) == (False, "results [0] of two runs are not the same bits")
    assert row_of("glu", "silu", Context(dry=True))["ok"]
    assert asked == [True, True, False]
    assert not torch.are_deterministic_algorithms_enabled()


def test_nan_and_another_shape_never_agree() -> None:
    ones = torch.ones(3, 4)
    one_nan = ones.clone()
    one_nan[0, 0] = float("nan")
    assert excess(one_nan, ones.double(), {})[2]
    assert excess(ones.t(), ones.double(), {})[2]
    assert excess(torch.zeros(0), torch.zeros(0), {})[2] == ""
