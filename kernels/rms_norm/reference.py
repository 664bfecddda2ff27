"""RMSNorm in plain torch, at least in fp32; what CPU tensors take."""

from __future__ import annotations

import torch
from torch import Tensor

from nanotron_fast.kernels.runtime.once import once_differentiable


def rms_norm_reference(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    zero_centered: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same in plain torch, at least in fp32; what torch.compile takes on a CPU."""
    h = x if residual is None else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    values = h.to(wide)
    factor = _factor(weight, wide, zero_centered)
    normed = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    y = (normed * factor).to(x.dtype)
    return y if residual is None else (y, h)


class RmsNormOfCpu(torch.autograd.Function):
    """By the formulas of rms_norm, in half the passes that autograd makes of the reference."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps, zero_centered):
        h = x if residual is None else x + residual
        wide = torch.promote_types(x.dtype, torch.float32)
        values = h.to(wide)
        rstd = values.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        y = (values * rstd).mul_(_factor(weight, wide, zero_centered)).to(x.dtype)
        ctx.save_for_backward(h, weight, rstd)
        ctx.zero_centered = zero_centered
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, h)

    @staticmethod
    @once_differentiable("rms_norm")
    def backward(ctx, dy, dh_out=None):
        if dy is None:
            return dh_out, dh_out, None, None, None
        h, weight, rstd = ctx.saved_tensors
        wide, hidden = rstd.dtype, h.shape[-1]
        normed, dy = h.to(wide) * rstd, dy.to(wide)
        factor = _factor(weight, wide, ctx.zero_centered)
        products = dy * normed
        dw = products.reshape(-1, hidden).sum(0).to(weight.dtype)
        mean = (products @ factor).div_(hidden).unsqueeze(-1)
        dx = (dy * factor).sub_(normed.mul_(mean)).mul_(rstd)
        if dh_out is not None:
            dx.add_(dh_out)
        dx = dx.to(h.dtype)
        return dx, dx if ctx.needs_input_grad[1] else None, dw, None, None


def _factor(weight: Tensor, wide: torch.dtype, zero_centered: bool) -> Tensor:
    return weight.to(wide) + 1 if zero_centered else weight.to(wide)
