"""The norms of the residual stream, each together with the sum before it."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor

from nanotron_fast.kernels.rms_norm import rms_norm
from nanotron_fast.models.weights import Setting, Weights


class Norm(Weights):
    """An RMSNorm, or a LayerNorm, with a bias or without one."""

    def __init__(self, setting: Setting) -> None:
        spec = setting.spec
        super().__init__(may_have_bias=spec.norm == "layer_norm")
        self.is_rms, self.eps = spec.norm == "rms_norm", spec.norm_eps
        self.adds_one = spec.norm_adds_one

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and the sum."""
        if self.is_rms and residual is not None:
            normed = rms_norm(x, self.weight, self.eps, residual, zero_centered=self.adds_one)
            return cast(tuple[Tensor, Tensor], normed)
        stream = x if residual is None else x + residual
        return self.of(stream), stream

    def of(self, x: Tensor) -> Tensor:
        """The norm of x alone."""
        if self.is_rms:
            return cast(Tensor, rms_norm(x, self.weight, self.eps, zero_centered=self.adds_one))
        bias = self.bias if "bias" in self._parameters else None
        return F.layer_norm(x, x.shape[-1:], self.weight, bias, self.eps)
