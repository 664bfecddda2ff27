"""A run on a GPU beside the same on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanotron_fast.train.metrics import read_metrics
from tests.train.runs import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_a_run_on_a_gpu_is_that_on_the_cpu(tmp_path: Path, dtype: str, tolerance: float) -> None:
    pytest.importorskip("yaml")
    changes: dict[str, Any] = {
        "model__dtype": dtype,
        "tokens__train_steps": 4,
        "tokens__val_check_interval": 2,
        "tokens__limit_val_batches": 1,
        "checkpoints__checkpoint_interval": 2,
    }
    torch.backends.cuda.matmul.allow_tf32 = False
    train(tmp_path / "cpu", **changes)
    result = train(tmp_path / "gpu", device="cuda", **changes)
    pairs = zip(
        *(read_metrics(tmp_path / each / "metrics.jsonl") for each in ("gpu", "cpu")), strict=True
    )
    for ours, theirs in pairs:
        for key in ("loss", "grad_norm", "validation_loss"):
            if key in theirs:
                assert abs(ours[key] - theirs[key]) <= tolerance * theirs[key], (key, ours, theirs)
        assert ours["memory_bytes"] < theirs["memory_bytes"]
    assert result.checkpoint == tmp_path / "gpu" / "4"
    # It goes on from a checkpoint of the CPU's.
    again = {"checkpoints__resume_checkpoint_path": str(tmp_path / "cpu")}
    resumed = train(
        tmp_path / "cpu", device="cuda", **{**changes, "tokens__train_steps": 6, **again}
    )
    assert resumed.step == 6
