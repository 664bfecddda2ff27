"""The head and its loss as one function, so that the logits never exist whole.

Nanotron has them in pipeline blocks of their own: the head, in Llama a cast to fp32, and the loss.
Where one rank computes them all and nobody watches any of them, the blocks stay, with their
messages to other ranks: the modules of the head and the cast hand the hidden states on, and that of
the loss is one that takes hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanotron_fast.kernels.linear_cross_entropy import linear_cross_entropy
from nanotron_fast.kernels.runtime.collectives import resolve
from nanotron_fast.parallel.whole import GatheredWhole
from nanotron_fast.patch.nanotron.fallbacks import fall_back
from nanotron_fast.patch.nanotron.origin import why_not_whole
from nanotron_fast.patch.nanotron.targets import DropInOptions

_LOSSES = ("Loss", "LossWithZLoss")
# A target that no vocabulary has and no data use: of tokens that the label mask leaves out.
_MASKED = -(2**31)
_ABSENT = object()


def model(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`LlamaForTraining.forward` and `Qwen2ForTraining.forward`."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        head, cast, loss = _blocks(self)
        if not hasattr(loss, "pp_block"):  # another rank of the pipeline has the loss
            return original(self, *args, **kwargs)
        reason = _why_apart(self.model, head, cast, loss)
        if reason:
            fall_back("fused_loss", original, reason)
            return original(self, *args, **kwargs)
        fused = partial(_loss, head.pp_block, loss.pp_block, cast is not None, options)
        handing_on = [head] if cast is None else [head, cast]
        with _in_place_of([(block, _hand_on) for block in handing_on] + [(loss, fused)]):
            return original(self, *args, **kwargs)

    return forward


def _blocks(self: Any) -> tuple[Any, Any, Any]:
    """Head, cast to fp32 (Llama alone has one), and loss, as pipeline blocks."""
    return self.model.lm_head, getattr(self.model, "cast_to_fp32", None), self.loss


def _why_apart(model: Any, head: Any, cast: Any, loss: Any) -> str:
    """Why the head and the loss stay two; empty where they may be one."""
    blocks = {"the head": head, "the cast of the logits": cast, "the loss": loss}
    ranks = {name: block.rank for name, block in blocks.items() if block is not None}
    if len(set(ranks.values())) > 1:
        where = ", ".join(f"{name} on {rank}" for name, rank in ranks.items())
        return f"they are on different ranks of the pipeline: {where}"
    linear, ending = head.pp_block, loss.pp_block
    for module, names in ((linear, ("TensorParallelColumnLinear",)), (ending, _LOSSES)):
        if type(module).__name__ not in names:
            return f"a {type(module).__name__} is not one of {', '.join(names)}"
    if linear.bias is not None:
        return "the head has a bias"
    watched = {"the model": model, **blocks, "the head's linear": linear, "the loss's own": ending}
    return why_not_whole(**watched)


@contextmanager
def _in_place_of(pairs: list[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    """For a while other functions lie where pipeline blocks look for their modules.

    An attribute of the instance comes before its submodules.
    """
    before = [vars(block).get("pp_block", _ABSENT) for block, _ in pairs]
    for block, function in pairs:
        vars(block)["pp_block"] = function
    try:
        yield
    finally:
        for (block, _), was in zip(pairs, before, strict=True):
            if was is _ABSENT:
                del vars(block)["pp_block"]
            else:
                vars(block)["pp_block"] = was


def _hand_on(x: Tensor) -> Tensor:
    return x


def _loss(
    linear: Any,
    ending: Any,
    is_sequence_first: bool,
    options: DropInOptions,
    *,
    sharded_logits: Tensor,
    label_ids: Tensor,
    label_mask: Tensor,
) -> dict[str, Tensor]:
    """What the loss's module returns, from the hidden states that its argument is in truth.

    Hidden states (seq, batch, hidden) of Llama, (batch * seq, hidden) of Qwen2, a share of their
    dimension 0 with sequence parallelism; label_ids and label_mask (batch, seq).
    """
    hidden, weight = sharded_logits, linear.weight
    if hidden.dtype != weight.dtype or torch.is_autocast_enabled(hidden.device.type):
        named = {"label_ids": label_ids, "label_mask": label_mask}
        found: dict[str, Tensor] = ending(sharded_logits=linear(hidden), **named)
        return found
    rows, ranks = hidden.flatten(0, -2), resolve(linear.pg)
    if linear.mode.name == "REDUCE_SCATTER" and ranks.size > 1:
        rows = GatheredWhole.apply(rows, ranks)
    if is_sequence_first:
        label_ids, label_mask = label_ids.transpose(0, 1), label_mask.transpose(0, 1)
    # A mask of bools leaves tokens out, so that one number scales the gradients of all others.
    is_plain = label_mask.dtype == torch.bool
    target, ignored = label_ids.long(), options.ignore_index
    if is_plain:
        ignored = _MASKED if ignored is None else ignored
        target = target.masked_fill(~label_mask, ignored)
    coefficient = float(getattr(ending, "z_loss_coef", 0.0))
    losses = linear_cross_entropy(
        rows,
        weight,
        target.reshape(-1),
        linear.pg,
        ignore_index=ignored,
        reduction="sum" if is_plain else "none",
        z_loss=coefficient,
        z_loss_mode=options.z_loss_mode,
    )
    loss, z = losses if isinstance(losses, tuple) else (losses, torch.zeros_like(losses))
    if not is_plain:
        weights = label_mask.reshape(-1)
        loss, z = (loss * weights).sum(), (z * weights).sum()
    counted = label_mask.sum()
    if type(ending).__name__ == "LossWithZLoss":
        return {"loss": loss / counted, "z_loss": z.detach() / counted}
    return {"loss": loss / counted}
