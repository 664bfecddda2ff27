"""Cross entropy over logits whose vocabulary is split between the ranks of a group.

With M the largest logit of a row, s = sum exp(l - M), both over all ranks, and t the target's:

    loss = log s - (t - M)          z = z_loss * (log s)^2       "nanotron": M is left out
    returned: loss + z, z           z = z_loss * (M + log s)^2   "correct": log-sum-exp itself
    dl = dloss * (exp(l - M) / s * (1 + 2 * z_loss * log s) - [l is the target's])

In "correct" mode the last line has M + log s in the place of log s too. All of it is fp32. z
carries no gradient: it is in the loss already, and is returned to be looked at. Nanotron does the
same: it drops what flows into the returned z, and its gradient of z takes M for a constant although
its z depends on it.

A target outside the vocabulary, -100 say, has t = M as in Nanotron: its loss is log s. With
`ignore_index` the loss and the gradient of such a token are 0 and its logits are not read.

Bytes for two-byte logits: forward 2 a logit; backward 4, and no more memory, for the gradient is
written over the logits. Saved: the logits, the targets, M and s (8 bytes a row). Communicated: one
all-gather of three numbers a row: each rank's largest logit, its sum, the target's logit.
Shapes: logits (rows, vocab/ranks); target, loss, z (rows,).

CPU tensors take the same three steps in plain torch, which stand beside the kernels in `operators`;
the reference in `reference` is for tests alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanotron_fast.kernels.cross_entropy.operators import combine, gradient, gradient_, statistics
from nanotron_fast.kernels.cross_entropy.reference import vocab_parallel_cross_entropy_reference
from nanotron_fast.kernels.runtime.collectives import Group, all_gather, resolve
from nanotron_fast.kernels.runtime.rows import as_row_of_ids, as_rows

__all__ = [
    "Z_LOSS_MODES",
    "check_options",
    "check_target",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_cross_entropy_reference",
]

Z_LOSS_MODES = ("nanotron", "correct")


class _CrossEntropy(torch.autograd.Function):
    """`terms`: ignore_index, z_loss, add_maximum. Gives the loss, or (loss + z, z)."""

    @staticmethod
    def forward(ctx, logits, target, ranks, terms, inplace):
        num_cols, (ignore_index, z_loss, _) = logits.shape[1], terms
        first_col = ranks.rank * num_cols
        of_all = all_gather(statistics(logits, target, first_col, ignore_index), ranks)
        loss, z, maximum_and_sum = combine(of_all, target, num_cols, *terms)
        ctx.save_for_backward(logits, target, maximum_and_sum)
        ctx.terms, ctx.inplace, ctx.is_spent = (first_col, *terms), inplace, False
        if not z_loss > 0:
            return loss
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    def backward(ctx, dloss, *_):
        if ctx.is_spent:
            raise RuntimeError(
                "vocab_parallel_cross_entropy: the first backward wrote the gradient over the "
                "logits; call it with inplace=False to run backward twice"
            )
        logits, target, maximum_and_sum = ctx.saved_tensors
        dloss = dloss.to(maximum_and_sum.dtype).contiguous()
        # Under create_graph the logits may be needed once more.
        if not ctx.inplace or torch.is_grad_enabled():
            dlogits = gradient(logits, target, maximum_and_sum, dloss, *ctx.terms)
        else:
            ctx.is_spent = True
            dlogits = logits.detach()
            gradient_(dlogits, target, maximum_and_sum, dloss, *ctx.terms)
        return dlogits, None, None, None, None


def _as_rows(logits: Tensor) -> Tensor:
    """(..., vocab/ranks) -> (rows, vocab/ranks), rows without gaps that do not overlap."""
    rows = as_rows(logits)
    is_apart = rows.stride(0) >= rows.shape[1] or rows.shape[0] <= 1
    return rows if is_apart else rows.contiguous()


def _is_leaf(tensor: Tensor) -> bool:
    """Whether its memory is that of a leaf, which the user holds: a parameter, or a view of one."""
    base = tensor._base
    return tensor.is_leaf if base is None else base.is_leaf


def check_options(name: str, z_loss: float, z_loss_mode: str) -> None:
    """Raises ValueError for a mode that is not there and for a weight below 0."""
    if z_loss_mode not in Z_LOSS_MODES:
        raise ValueError(f"{name}: z_loss_mode={z_loss_mode!r}: choose {', '.join(Z_LOSS_MODES)}")
    if not z_loss >= 0:
        raise ValueError(f"{name}: z_loss={z_loss} is below 0")


def check_target(name: str, target: Tensor, shape: torch.Size) -> None:
    """Raises ValueError unless there is one whole number a token."""
    if target.shape != shape:
        raise ValueError(f"{name}: target {tuple(target.shape)} for tokens {tuple(shape)}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f"{name}: target is {target.dtype}, not whole numbers")


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    group: Group = None,
    *,
    ignore_index: int | None = None,
    z_loss: float = 0.0,
    z_loss_mode: str = "nanotron",
    inplace: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """The loss of every token, where rank r of the group holds logits r * vocab/ranks and on.

    In eager mode backward writes the gradient over the logits: the logits are gone then, a second
    backward raises RuntimeError, and so does torch where another operation saved them for its own
    backward. Logits that are a leaf, or a view of one, are left as they are; so is everything under
    torch.compile.

    Args:
        logits: (..., vocab/ranks), bf16, fp16 or fp32.
        target: (...) of any integer dtype: ids in the whole vocabulary, the same on every rank.
        group: a process group, a DeviceMesh of one dimension, or None for a rank alone.
        ignore_index: tokens with this target have neither loss nor gradient. None: no token is left
            out, and a target outside the vocabulary counts as Nanotron counts it.
        z_loss: weight of the z-loss (PaLM, section 5).
        z_loss_mode: "nanotron", which leaves the largest logit out of the log-sum-exp, or
            "correct".
        inplace: False leaves the logits as they are.

    Returns:
        The loss (...) in fp32, or, where z_loss > 0, (loss + z, z). z carries no gradient.

    Raises:
        ValueError: shapes, dtypes or options do not fit.
    """
    name = "vocab_parallel_cross_entropy"
    check_options(name, z_loss, z_loss_mode)
    if logits.dim() == 0 or logits.shape[-1] == 0 or not logits.is_floating_point():
        raise ValueError(f"{name}: logits {tuple(logits.shape)} {logits.dtype}")
    check_target(name, target, logits.shape[:-1])
    rows = _as_rows(logits)
    inplace = inplace and not torch.compiler.is_compiling() and not _is_leaf(rows)
    terms = (ignore_index, float(z_loss), z_loss_mode == "correct")
    found = _CrossEntropy.apply(rows, as_row_of_ids(target), resolve(group), terms, inplace)
    if z_loss > 0:
        loss, z = found
        return loss.view(target.shape), z.view(target.shape)
    return found if target.dim() == 1 else found.view(target.shape)
