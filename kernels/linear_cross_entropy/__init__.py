"""The language-model head and its loss together: cross entropy of hidden @ weight^T, in chunks.

    logits = hidden @ weight^T, rounded to hidden's dtype as a linear layer of its own would
    loss   = cross_entropy(logits, target), by the formulas in `cross_entropy`
    dhidden = dlogits @ weight        dweight = dlogits^T @ hidden

The tokens pass in chunks, each through the vendor's matrix product, the kernels of the cross
entropy and two more products, in one buffer of (chunk_tokens, vocab/ranks) logits that their
gradient overwrites: no more logits than that exist. 6 * tokens * hidden * vocab/ranks FLOPs. The
memory traffic beside the products is 6 bytes a logit, and 8 bytes an element of dweight for every
chunk but the first (4), for it is summed in fp32: that takes as long as the product it adds at some
900 tokens on an H100. So the default is the largest chunk whose logits take 1 GiB in bf16, and half
of the tokens at most.

Of a mean or a sum one number scales all gradients, so forward computes dhidden and dweight, keeps
them instead of hidden and weight (4 bytes an element of dweight, 2 of dhidden), and backward
multiplies, rounding dweight once, dhidden twice. With reduction "none" every token has its own
factor: forward keeps M and s of each row, and backward computes the logits a second time
(8 instead of 6 FLOPs). Both are exact, and both can run backward twice.

With a group, rank r holds rows r * vocab/ranks and on of the weight, hidden is the same on every
rank, and dhidden is summed over the group here, in hidden's dtype, while the next chunk computes:
the backward of Nanotron's column linear in its ALL_REDUCE mode. Besides, every chunk takes one
all-gather of three numbers a token.
Shapes: hidden, dhidden (tokens, hidden); weight, dweight (vocab/ranks, hidden); target, loss, z
(tokens,); M and s (2, tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanotron_fast.kernels.cross_entropy import check_options, check_target
from nanotron_fast.kernels.linear_cross_entropy.operators import Settings, backward, forward
from nanotron_fast.kernels.linear_cross_entropy.reference import (
    linear_cross_entropy_reference,
    scale_sum,
)
from nanotron_fast.kernels.runtime.autocast import as_autocast
from nanotron_fast.kernels.runtime.collectives import Group, resolve
from nanotron_fast.kernels.runtime.main_grad import eager_main_grad

__all__ = ["REDUCTIONS", "linear_cross_entropy", "linear_cross_entropy_reference"]

REDUCTIONS = ("none", "mean", "sum")


def _scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor * factor, multiplied in fp32 and rounded once."""
    factor = factor.reshape(1, 1)  # of no dimensions it would be rounded to the tensor's dtype
    if torch.compiler.is_compiling():
        return (tensor * factor).to(dtype)
    return torch.mul(tensor, factor, out=torch.empty_like(tensor, dtype=dtype))


class _SummedLoss(torch.autograd.Function):
    """The sum over tokens, whose gradients forward computes."""

    @staticmethod
    def forward(ctx, hidden, weight, target, settings, of_hidden, of_weight):
        loss, z, _, dhidden, dweight = forward(
            hidden,
            weight.to(hidden.dtype),
            target,
            **settings.named(),
            of_hidden=of_hidden,
            of_weight=of_weight,
        )
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.needed, ctx.main_grad = (of_hidden, of_weight), eager_main_grad(weight)
        z = z.sum()
        ctx.mark_non_differentiable(z)
        return loss.sum(), z

    @staticmethod
    def backward(ctx, dloss, _):
        (dhidden, dweight), (of_hidden, of_weight) = ctx.saved_tensors, ctx.needed
        if of_weight and ctx.main_grad is not None:
            ctx.main_grad.addcmul_(dweight, dloss.reshape(1, 1))
            of_weight = False
        return (
            _scaled(dhidden, dloss, ctx.dtypes[0]) if of_hidden else None,
            _scaled(dweight, dloss, ctx.dtypes[1]) if of_weight else None,
            *(None,) * 4,
        )


class _TokenLosses(torch.autograd.Function):
    """The loss of every token, whose logits backward computes again."""

    @staticmethod
    def forward(ctx, hidden, weight, target, settings, of_hidden, of_weight):
        loss, z, maximum_and_sum, _, _ = forward(
            hidden,
            weight.to(hidden.dtype),
            target,
            **settings.named(),
            of_hidden=False,
            of_weight=False,
        )
        ctx.save_for_backward(hidden, weight, target, maximum_and_sum)
        ctx.settings, ctx.needed = settings, (of_hidden, of_weight)
        ctx.main_grad = eager_main_grad(weight)
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    def backward(ctx, dloss, _):
        hidden, weight, target, maximum_and_sum = ctx.saved_tensors
        dloss = dloss.to(maximum_and_sum.dtype).contiguous()
        of_hidden, of_weight = ctx.needed
        dhidden, dweight = backward(
            hidden,
            weight.to(hidden.dtype),
            target,
            maximum_and_sum,
            dloss,
            **ctx.settings.named(),
            of_hidden=of_hidden,
            of_weight=of_weight,
        )
        if of_weight and ctx.main_grad is not None:
            ctx.main_grad.add_(dweight)
            of_weight = False
        return (
            dhidden if of_hidden else None,
            dweight.to(weight.dtype) if of_weight else None,
            *(None,) * 4,
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    group: Group = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
    z_loss: float = 0.0,
    z_loss_mode: str = "nanotron",
    chunk_tokens: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The cross entropy of hidden @ weight^T, whose logits never exist whole.

    Args:
        hidden: (tokens, hidden), bf16, fp16 or fp32, the same on every rank of the group.
        weight: (vocab/ranks, hidden) in hidden's dtype, or in fp32: this rank's rows. One in fp32
            is cast for the products, and has a gradient that nothing has rounded. If it has a
            `main_grad` (fp32, its shape), its gradient is added to that, unrounded, and `grad`
            stays None.
        target: (tokens,) of any integer dtype: ids in the whole vocabulary.
        group: a process group, a DeviceMesh of one dimension, or None for a rank alone. dhidden
            comes back summed over it.
        ignore_index: tokens with this target have neither loss nor gradient.
        reduction: "none"; "sum"; or "mean" over the tokens that are not ignored, which is 0 where
            there are none.
        z_loss: weight of the z-loss.
        z_loss_mode: "nanotron" or "correct", see `vocab_parallel_cross_entropy`.
        chunk_tokens: tokens whose logits exist at a time. None chooses, see above.

    Returns:
        The loss in fp32, () or (tokens,), or, where z_loss > 0, (loss + z, z). z carries no
        gradient.

    Raises:
        ValueError: shapes, dtypes or options do not fit.
    """
    name = "linear_cross_entropy"
    check_options(name, z_loss, z_loss_mode)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction={reduction!r}: choose {', '.join(REDUCTIONS)}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{name}: chunk_tokens={chunk_tokens} is below 1")
    fits = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    # Under autocast hidden alone: the gradient of the weight need not pass through a cast.
    (hidden,) = as_autocast(hidden) if fits else (hidden,)
    fits = fits and weight.dtype in (hidden.dtype, torch.float32)
    if not fits or weight.shape[0] == 0 or weight.dtype.itemsize < hidden.dtype.itemsize:
        raise ValueError(
            f"{name}: weight {tuple(weight.shape)} {weight.dtype} "
            f"for hidden {tuple(hidden.shape)} {hidden.dtype}"
        )
    check_target(name, target, hidden.shape[:1])
    settings = Settings(
        ranks=resolve(group),
        ignore_index=ignore_index,
        z_loss=float(z_loss),
        add_maximum=z_loss_mode == "correct",
        chunk_tokens=chunk_tokens or 0,
    )
    of_hidden, of_weight = (torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight))
    function = _TokenLosses if reduction == "none" else _SummedLoss
    loss, z = function.apply(
        hidden, weight.contiguous(), target.contiguous(), settings, of_hidden, of_weight
    )
    if reduction != "none":
        loss, z = (scale_sum(t, target, ignore_index, reduction) for t in (loss, z))
    return (loss, z) if z_loss > 0 else loss
