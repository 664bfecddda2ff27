"""Cross entropy in plain torch, on one rank: what the three steps are held to in the tests.

The formulas are in `cross_entropy`. Shapes: logits (..., vocab); target, loss, z (...).
"""

from __future__ import annotations

import torch
from torch import Tensor


def vocab_parallel_cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int | None = None,
    z_loss: float = 0.0,
    z_loss_mode: str = "nanotron",
) -> Tensor | tuple[Tensor, Tensor]:
    """The same for a whole vocabulary on one rank: plain torch, and torch's own gradient."""
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))
    maximum = values.detach().amax(-1, keepdim=True)
    shifted = values - maximum
    log_sum = shifted.exp().sum(-1).log()
    inside = (target >= 0) & (target < logits.shape[-1])
    index = torch.where(inside, target, 0).long().unsqueeze(-1)
    loss = log_sum - torch.where(inside, shifted.gather(-1, index).squeeze(-1), 0.0)
    log_z = log_sum + maximum.squeeze(-1) if z_loss_mode == "correct" else log_sum
    z = z_loss * log_z.square()
    loss = loss + z
    if ignore_index is not None:
        loss, z = (torch.where(target == ignore_index, 0.0, t) for t in (loss, z))
    return (loss, z.detach()) if z_loss > 0 else loss
