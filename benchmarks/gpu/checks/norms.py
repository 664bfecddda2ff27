"""RMSNorm and the gated linear units."""

from __future__ import annotations

import torch

from benchmarks.gpu.context import Context
from benchmarks.gpu.harness import Builder, Check, check, precompile
from nanotron_fast.kernels.glu import glu, glu_reference
from nanotron_fast.kernels.rms_norm import rms_norm, rms_norm_reference

__all__ = ["BUILDERS", "check", "precompile"]

# Hidden sizes of the dry run: no powers of two, and one that is wider than a block of several rows.
_TINY_HIDDEN = {4096: 96, 8192: 200, 16384: 1100}


def _rms_norm(variant: str, context: Context) -> Check:
    width, _, has_residual = variant.partition(" ")
    hidden = context.size(int(width), _TINY_HIDDEN[int(width)])
    rows = context.size(4096, 7)
    device, dtype = context.device, context.dtype()
    x, residual = (torch.randn(rows, hidden, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(hidden, device=device).to(dtype)
    inputs = [x, weight, *([residual] if has_residual else [])]
    return Check(
        [t.requires_grad_() for t in inputs],
        lambda x, w, r=None: rms_norm(x, w, 1e-6, r),
        lambda x, w, r=None: rms_norm_reference(x, w, 1e-6, r),
    )


def _glu(variant: str, context: Context) -> Check:
    shape = (context.size(4096, 5), 2 * context.size(14336, 72))
    gate_up = torch.randn(shape, device=context.device).to(context.dtype()).requires_grad_()
    return Check([gate_up], lambda x: glu(x, variant), lambda x: glu_reference(x, variant))


BUILDERS: dict[str, Builder] = {"rms_norm": _rms_norm, "glu": _glu}
