"""The head and its loss in plain torch, on one rank and with the logits whole."""

from __future__ import annotations

from torch import Tensor

from nanotron_fast.kernels.cross_entropy import vocab_parallel_cross_entropy_reference


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
    z_loss: float = 0.0,
    z_loss_mode: str = "nanotron",
) -> Tensor | tuple[Tensor, Tensor]:
    """The same for a whole vocabulary on one rank: plain torch, the logits whole."""
    out = vocab_parallel_cross_entropy_reference(
        hidden @ weight.t(),
        target,
        ignore_index=ignore_index,
        z_loss=z_loss,
        z_loss_mode=z_loss_mode,
    )
    losses = out if isinstance(out, tuple) else (out,)
    reduced = tuple(_reduce(loss, target, ignore_index, reduction) for loss in losses)
    return reduced if z_loss > 0 else reduced[0]


def _reduce(loss: Tensor, target: Tensor, ignore_index: int | None, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return scale_sum(loss.sum(), target, ignore_index, reduction)


def scale_sum(total: Tensor, target: Tensor, ignore_index: int | None, reduction: str) -> Tensor:
    """The sum itself, or the mean over the tokens that count, which is 0 where there are none."""
    if reduction == "sum":
        return total
    if ignore_index is None:
        return total / max(target.numel(), 1)
    return total / (target != ignore_index).sum().clamp(min=1)
