"""The language-model head and its loss together: cross entropy of hidden @ weight^T, in chunks.

    logits = hidden @ weight^T, rounded to hidden's dtype as a linear layer of its own would
    loss   = cross_entropy(logits, target), by the formulas in `cross_entropy`
    dhidden = dlogits @ weight        dweight = dlogits^T @ hidden

The tokens pass in chunks, each through the vendor's matrix product, the kernels of the cross
entropy and two more products, in one buffer of (chunk_tokens, vocab/ranks) logits that their
gradient overwrites: no more logits than that exist. By default a chunk is all tokens where their
logits take 1 GiB in bf16 at most, and else an even part of them. In every way the traffic beside
the products' own is 6 bytes a logit: 2 for the statistics, 4 for the gradient.

For a mean or a sum with a gradient of the weight, a chunk is all tokens too where their logits take
that and as much as the weight (8192 tokens of 4096 values over 131072 ids): chunks would keep twice
the weight, so the peak is no higher.

One chunk, in eager mode: forward keeps the logits (2 bytes each; M and s, 8 bytes a token), and
backward turns them into their gradient in place, with the factor of each token's loss in the same
kernel. 6 * tokens * hidden * vocab/ranks FLOPs. The products write what is asked for, rounded once:
2 bytes an element of dhidden and of dweight, or 8 of dweight where it is added to a `main_grad`. A
second backward computes the logits again, to the same bits.

Several chunks, a mean or a sum: one number scales all gradients, so forward computes dhidden and
dweight, keeps them instead of hidden and weight (4 bytes an element of dweight, 2 of dhidden), and
backward multiplies, rounding dweight once, dhidden twice. The same FLOPs; dweight is summed in
fp32, 4 bytes an element for the first chunk, 8 for each other (as long as the product that it adds
at some 900 tokens on an H100), and 6 for the scaling, or 12 into a `main_grad`. So does fp16 with
one chunk: with the factor of a mean its gradients of logits would vanish below 6e-8.

Several chunks, reduction "none": every token has its own factor. Forward keeps M and s of each row,
and backward computes the logits a second time (8 instead of 6 FLOPs) and adds dweight to fp32, a
`main_grad` where there is one. All ways are exact, and all can run backward twice. torch.compile
takes those of several chunks, whatever their number.

With a group, rank r holds rows r * vocab/ranks and on of the weight, hidden is the same on every
rank, and dhidden is summed over the group here, in hidden's dtype, while the next product computes:
the backward of Nanotron's column linear in its ALL_REDUCE mode. Besides, every chunk takes one
all-gather of three numbers a token.
Shapes: hidden, dhidden (tokens, hidden); weight, dweight (vocab/ranks, hidden); target, loss, z
(tokens,); M and s (2, tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanotron_fast.kernels.cross_entropy import check_options, check_target
from nanotron_fast.kernels.linear_cross_entropy.operators import (
    Gradients,
    Settings,
    add_in_chunks,
    backward,
    forward,
    is_one_chunk,
)
from nanotron_fast.kernels.linear_cross_entropy.reference import (
    linear_cross_entropy_reference,
    scale_sum,
)
from nanotron_fast.kernels.linear_cross_entropy.whole import WholeLosses
from nanotron_fast.kernels.runtime.autocast import as_autocast
from nanotron_fast.kernels.runtime.collectives import Group, resolve
from nanotron_fast.kernels.runtime.main_grad import eager_main_grad
from nanotron_fast.kernels.runtime.once import once_differentiable
from nanotron_fast.kernels.runtime.rows import as_row_of_ids

__all__ = ["REDUCTIONS", "linear_cross_entropy", "linear_cross_entropy_reference"]

REDUCTIONS = ("none", "mean", "sum")


def _scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor * factor, multiplied in fp32 and rounded once."""
    factor = factor.reshape(1, 1)  # of no dimensions it would be rounded to the tensor's dtype
    if torch.compiler.is_compiling():
        return (tensor * factor).to(dtype)
    return torch.mul(tensor, factor, out=torch.empty_like(tensor, dtype=dtype))


class _SummedLoss(torch.autograd.Function):
    """The sum over tokens, whose gradients forward computes; z; nothing, which leads back to them.

    Of hidden and weight nothing is kept, and the sum itself may be written over.
    """

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
        nothing = loss.new_empty(0)
        ctx.save_for_backward(dhidden, dweight, nothing)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.needed, ctx.main_grad = (of_hidden, of_weight), eager_main_grad(weight)
        z = z.sum()
        ctx.mark_non_differentiable(z)
        return loss.sum(), z, nothing

    @staticmethod
    @once_differentiable("linear_cross_entropy")
    def backward(ctx, dloss, *_):
        (dhidden, dweight, _), (of_hidden, of_weight) = ctx.saved_tensors, ctx.needed
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
    @once_differentiable("linear_cross_entropy")
    def backward(ctx, dloss, _):
        hidden, weight, target, maximum_and_sum = ctx.saved_tensors
        dloss = dloss.to(maximum_and_sum.dtype).contiguous()
        of_hidden, of_weight = ctx.needed
        low = weight.to(hidden.dtype)
        if of_weight and ctx.main_grad is not None:
            dhidden = hidden.new_empty(hidden.shape) if of_hidden else None
            gradients = Gradients(
                hidden, low, ctx.settings.ranks, dhidden, ctx.main_grad, is_added=True
            )
            add_in_chunks(gradients, target, maximum_and_sum, dloss, ctx.settings)
            return dhidden, *(None,) * 5
        dhidden, dweight = backward(
            hidden,
            low,
            target,
            maximum_and_sum,
            dloss,
            **ctx.settings.named(),
            of_hidden=of_hidden,
            of_weight=of_weight,
        )
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
    """The cross entropy of hidden @ weight^T, whose logits exist in chunks.

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
        chunk_tokens: tokens whose logits exist at a time. None chooses, see above. Where that is
            all of them the logits are kept for backward: below the number of tokens it saves that.

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
    fits = fits and hidden.is_floating_point() and weight.dtype in (hidden.dtype, torch.float32)
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
    target = as_row_of_ids(target)
    if _keeps_logits(hidden, weight, reduction, settings.chunk_tokens):
        loss, z = WholeLosses.apply(hidden, weight, target, settings)
        if reduction != "none":
            loss, z = loss.sum(), z.sum()
    else:
        of = (torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight))
        function = _TokenLosses if reduction == "none" else _SummedLoss
        loss, z, *_ = function.apply(hidden, weight, target, settings, *of)
    if reduction != "none":
        loss, z = (scale_sum(t, target, ignore_index, reduction) for t in (loss, z))
    return (loss, z) if z_loss > 0 else loss


def _keeps_logits(hidden: Tensor, weight: Tensor, reduction: str, chunk_tokens: int) -> bool:
    """Whether the logits wait for backward; in fp16 a sum's gradients would vanish, see above."""
    is_sum = reduction != "none"
    if torch.compiler.is_compiling() or (is_sum and hidden.dtype == torch.float16):
        return False
    # As many tokens have as many logits as the weight has elements.
    is_trained = torch.is_grad_enabled() and weight.requires_grad
    spared = hidden.shape[1] if is_sum and is_trained else 0
    return is_one_chunk(hidden.shape[0], weight.shape[0], chunk_tokens, spared)
