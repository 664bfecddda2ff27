"""RMSNorm and the gated linear units."""

from __future__ import annotations

import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.harness import Builder, Check, check, precompile

__all__ = ["BUILDERS", "check", "precompile"]

# Hidden sizes of the dry run: no powers of two, one that is wider than a block of several rows, and
# one whose rows are in parts.
_TINY_HIDDEN = {4096: 96, 8192: 200, 16384: 1100, 32768: 16648}


def _rms_norm(variant: str, context: Context) -> Check:
    from nanotron_fast.kernels.rms_norm import rms_norm, rms_norm_reference

    width, _, has_residual = variant.partition(" ")
    hidden = context.size(int(width), _TINY_HIDDEN[int(width)])
    rows = context.size(4096, 7)
    device, dtype = context.device, context.dtype()
    # eps is as large as the mean square beside it, as the usual one is for small activations:
    # beside activations of unit size nobody would see it.
    scale, eps = (1.0, 0.5) if has_residual else (1e-3, 1e-6)
    x, residual = (torch.randn(rows, hidden, device=device) * scale for _ in range(2))
    x, residual = x.to(dtype), residual.to(dtype)
    weight = torch.randn(hidden, device=device).to(dtype)
    inputs = [x, weight, *([residual] if has_residual else [])]
    return Check(
        [t.requires_grad_() for t in inputs],
        lambda x, w, r=None: rms_norm(x, w, eps, r),
        lambda x, w, r=None: rms_norm_reference(x, w, eps, r),
    )


def _glu(variant: str, context: Context) -> Check:
    from nanotron_fast.kernels.glu import glu, glu_reference

    shape = (context.size(4096, 5), 2 * context.size(14336, 72))
    gate_up = torch.randn(shape, device=context.device).to(context.dtype()).requires_grad_()
    return Check([gate_up], lambda x: glu(x, variant), lambda x: glu_reference(x, variant))


BUILDERS: dict[str, Builder] = {"rms_norm": _rms_norm, "glu": _glu}
