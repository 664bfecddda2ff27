"""Training of Nanotron's models, with Nanotron's own YAML."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanotron_fast.train.config import TrainingConfig

__all__ = ["TrainingConfig"]


def __getattr__(name: str) -> Any:
    if name == "TrainingConfig":
        from nanotron_fast.train.config import TrainingConfig

        return TrainingConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
