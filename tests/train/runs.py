"""Short runs of a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanotron_fast.train import Trainer, TrainingConfig, TrainingResult
from tests.train.configs import document

SIZES: dict[str, Any] = {
    "tokens__sequence_length": 16,
    "tokens__micro_batch_size": 2,
    "tokens__batch_accumulation_per_replica": 2,
    "model__dtype": "float32",
    "optimizer__accumulate_grad_in_fp32": False,
}


def config(root: Path, **changes: Any) -> TrainingConfig:
    """That of tests/train/configs.py, smaller; checkpoints go to `root`."""
    changes = {**SIZES, "checkpoints__checkpoints_path": str(root), **changes}
    return TrainingConfig.from_dict(document(**changes), name="x.yaml")


def train(
    root: Path, *, batches: Any = None, device: str = "cpu", **changes: Any
) -> TrainingResult:
    """Trains as the changes of the configuration say."""
    return Trainer(config(root, **changes), batches=batches, device=device, is_quiet=True).run()
