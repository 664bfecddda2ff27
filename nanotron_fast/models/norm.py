"""The norms of the residual stream, each together with the sum before it."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor

from nanotron_fast.kernels.rms_norm import rms_norm
from nanotron_fast.models.weights import Setting, Weights


class Norm(Weights):
    """An RMSNorm, or a LayerNorm, which has a bias."""

    def __init__(self, setting: Setting) -> None:
        is_rms = setting.spec.norm == "rms_norm"
        super().__init__(may_have_bias=not is_rms)
        self.is_rms, self.eps = is_rms, setting.spec.norm_eps

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and the sum."""
        if self.is_rms and residual is None:
            return cast(Tensor, rms_norm(x, self.weight, self.eps)), x
        if self.is_rms:
            return cast(tuple[Tensor, Tensor], rms_norm(x, self.weight, self.eps, residual))
        stream = x if residual is None else x + residual
        return F.layer_norm(stream, stream.shape[-1:], self.weight, self.bias, self.eps), stream
