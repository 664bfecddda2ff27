"""flash_attn.ops.triton.layer_norm of 2.6: layer norm and RMS norm with the residual add."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanotron_fast.kernels.rms_norm import rms_norm
from nanotron_fast.patch.stand_ins.arguments import refuse


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """norm(x + residual) * weight + bias in x's dtype; with prenorm the sum too.

    x, residual (..., hidden); weight, bias (hidden,). The sum has residual's dtype, or without a
    residual x's, or fp32 with residual_in_fp32.
    """
    refuse(
        "layer_norm_fn",
        x1=x1 is not None,
        weight1=weight1 is not None,
        bias1=bias1 is not None,
        dropout_p=dropout_p > 0,
        rowscale=rowscale is not None,
        return_dropout_mask=return_dropout_mask,
    )
    dtype = x.dtype
    if residual is None:
        total = x.float() if residual_in_fp32 and dtype != torch.float64 else x
    elif is_rms_norm and bias is None and residual.dtype == dtype:
        y, total = rms_norm(x, weight, eps, residual)
        return (y, total) if prenorm else y
    else:
        total = (x + residual).to(residual.dtype)
    if is_rms_norm:
        y = rms_norm(total, weight, eps)
        y = y if bias is None else y + bias
    else:
        wide = torch.promote_types(total.dtype, torch.float32)
        wide_bias = None if bias is None else bias.to(wide)
        y = F.layer_norm(total.to(wide), total.shape[-1:], weight.to(wide), wide_bias, eps)
    y = y.to(dtype)
    return (y, total) if prenorm else y


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm_fn` with is_rms_norm."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        is_rms_norm=True,
        return_dropout_mask=return_dropout_mask,
    )
