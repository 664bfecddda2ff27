"""Training of Nanotron's models, with Nanotron's own YAML."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanotron_fast.train.config import TrainingConfig
    from nanotron_fast.train.run import TrainingResult
    from nanotron_fast.train.trainer import Trainer

# Imported when they are asked for: a configuration needs no torch.
_EXPORTS = {"TrainingConfig": "config", "TrainingResult": "run", "Trainer": "trainer"}
__all__ = ["Trainer", "TrainingConfig", "TrainingResult"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        if name != "TrainingConfig":
            from nanotron_fast.extras import EXTRAS, require

            # Tokens that are made already need no transformers.
            require("train", f"{__name__}.{name}", EXTRAS["kernels"])
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
