"""RMSNorm, with the residual add in the same pass.

    h = x + residual                      (rounded to x's dtype, as an add of its own would)
    y = h / sqrt(mean(h^2) + eps) * w     (w + 1 with a zero-centred weight)

All of it in fp32 and rounded once, into y. Backward, with r = 1 / sqrt(mean(h^2) + eps), n = h * r
and g = dy * w:

    dh = (g - n * mean(g * n)) * r + dh_out        dx = dresidual = dh
    dw = sum over rows of dy * n

Bytes for (rows, hidden) of two-byte elements: forward 4 an element, 8 with the residual; backward
6, 8 with the residual, and for rows of more than 16384 columns, which are taken in parts, 10 and 12
(part_kernels.py). Saved for backward: h, the weight and r (4 bytes a row).
Shapes: x, residual, y, h (..., hidden); weight (hidden,); r (rows,) fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanotron_fast.kernels.rms_norm import operators
from nanotron_fast.kernels.rms_norm.reference import RmsNormOfCpu, rms_norm_reference
from nanotron_fast.kernels.runtime.autocast import is_autocast
from nanotron_fast.kernels.runtime.backend import uses_triton

__all__ = ["rms_norm", "rms_norm_reference"]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, zero_centered):
        y, *h, rstd = operators.forward(x, residual, weight, eps, zero_centered)
        ctx.save_for_backward(*(h or (x,)), weight, rstd)
        ctx.zero_centered = zero_centered
        ctx.set_materialize_grads(False)
        return (y, *h) if h else y

    @staticmethod
    def backward(ctx, dy, dh_out=None):
        h, weight, rstd = ctx.saved_tensors
        if dy is None:
            return dh_out, dh_out, None, None, None
        dx, dw = operators.backward(dy, dh_out, h, weight, rstd, ctx.zero_centered)
        return dx, dx if ctx.needs_input_grad[1] else None, dw, None, None


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    zero_centered: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm (Zhang and Sennrich, 2019), of the sum of x and the residual where one is given.

    Args:
        x: (..., hidden), bf16, fp16 or fp32.
        weight: (hidden,), any of them.
        eps: added to the mean square.
        residual: x's shape and dtype. Under autocast, where a product is in a narrower dtype than
            what it is added to, both are taken in the wider one, as torch adds them.
        zero_centered: the weight is stored less one, as Gemma does.

    Returns:
        y (..., hidden) in x's dtype, or (y, x + residual).

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    fits = x.dim() > 0 and weight.shape == x.shape[-1:]
    if not fits or not (x.is_floating_point() and weight.is_floating_point()):
        raise ValueError(
            f"rms_norm: weight {tuple(weight.shape)} {weight.dtype} "
            f"for x {tuple(x.shape)} {x.dtype}"
        )
    if residual is not None and residual.dtype != x.dtype and is_autocast(x.device):
        wider = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wider), residual.to(wider)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"rms_norm: residual {tuple(residual.shape)} {residual.dtype} "
            f"for x {tuple(x.shape)} {x.dtype}"
        )
    if not uses_triton(x) or x.dtype == torch.float64:
        if torch.compiler.is_compiling() or x.is_cuda:
            return rms_norm_reference(x, weight, eps, residual, zero_centered)
        return RmsNormOfCpu.apply(x, residual, weight, eps, zero_centered)
    return _RmsNorm.apply(x, residual, weight.contiguous(), float(eps), zero_centered)
