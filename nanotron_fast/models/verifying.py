"""`verify`, with this package's own models to run what its own class describes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanotron_fast.checkpoints import verify as verification

if TYPE_CHECKING:
    from torch import Tensor


def forward_of(root: Path, choices: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """A checkpoint as a function of token ids (rows, length): logits in fp32, on the CPU.

    Raises CheckpointError, ConfigError, UnsupportedModelError, OSError.
    """
    import torch

    from nanotron_fast.models.building import build

    model = build(root, **choices)

    def run(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(tokens)
        return logits

    return run


# The face's: checkpoints cannot import models.
verify = wraps(verification.verify)(partial(verification.verify, own_forward=forward_of))
