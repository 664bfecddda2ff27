"""The embedding in plain torch, on one rank."""

from __future__ import annotations

import torch
from torch import Tensor


def vocab_parallel_embedding_reference(
    ids: Tensor, weight: Tensor, *, padding_idx: int | None = None
) -> Tensor:
    """The same for a whole vocabulary on one rank, in plain torch."""
    return torch.nn.functional.embedding(ids.long(), weight, padding_idx)
