"""The loss over logits that are split along the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanotron_fast.kernels.cross_entropy import vocab_parallel_cross_entropy
from nanotron_fast.patch.hooks import may_go_past
from nanotron_fast.patch.nanotron.targets import DropInOptions

# A loss that takes logits of any dtype has this attribute.
_TAKES_ANY = "__nanotron_fast_any_dtype__"


def cross_entropy(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`sharded_cross_entropy`: statistics in fp32 whatever the logits' dtype, so nothing is cast.

    Logits (..., vocab/tp), target (...); the loss (...) has `dtype`, or the logits' where that is
    None. Backward writes the gradient over the logits.
    """

    def sharded_cross_entropy(
        sharded_logits: Tensor,
        target: Tensor,
        group: Any,
        dtype: torch.dtype | None = None,
        z_loss_coef: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        found = vocab_parallel_cross_entropy(
            sharded_logits,
            target,
            group,
            ignore_index=options.ignore_index,
            z_loss=z_loss_coef,
            z_loss_mode=options.z_loss_mode,
        )
        dtype = sharded_logits.dtype if dtype is None else dtype
        return tuple(x.to(dtype) for x in found) if isinstance(found, tuple) else found.to(dtype)

    setattr(sharded_cross_entropy, _TAKES_ANY, True)
    return sharded_cross_entropy


def without_cast(original: Callable[..., Any], options: DropInOptions) -> Callable[..., Any]:
    """`LlamaModel.forward` without its cast of the logits to fp32, which the loss does not need.

    Only under autograd, and under our loss: generation, validation and the loss of somebody else
    get their fp32 logits.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_one_stage = getattr(self.cast_to_fp32, "rank", 0) == getattr(self.lm_head, "rank", 1)
        loss = original.__globals__.get("sharded_cross_entropy")
        is_ours = getattr(loss, _TAKES_ANY, False)
        may = torch.is_grad_enabled() and may_go_past(self.cast_to_fp32)
        if not (may and is_one_stage and is_ours):
            return original(self, *args, **kwargs)
        # An attribute of the instance comes before its submodules.
        vars(self)["cast_to_fp32"] = lambda x: {"output": x}
        try:
            return original(self, *args, **kwargs)
        finally:
            del vars(self)["cast_to_fp32"]

    return forward
