"""Balance of experts without a loss: a bias on the scores decides who is chosen, and is moved.

    bias[e] <- bias[e] + rate * sign(mean load - load[e])        after each step

The load of an expert is how many tokens of the global batch it was chosen for. The bias is the
router's correction bias, which no gradient moves and which does not weigh what an expert gives; it
is saved with the weights. Source: Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for
Mixture-of-Experts" (arXiv:2408.15664), as DeepSeek-V3 was trained (arXiv:2412.19437).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nanotron_fast.models.decoder import Decoder
from nanotron_fast.models.experts import Router
from nanotron_fast.train.mesh import Mesh
from nanotron_fast.train.zero import sum_over


class Balance:
    """The routers of a rank whose bias is moved.

    Args:
        parts: the modules of this rank; Decoders made with `counts_load`.
        rate: by which a bias moves in a step; with 0 nothing does.
    """

    def __init__(self, parts: Sequence[nn.Module], mesh: Mesh, *, rate: float) -> None:
        self._rate = rate
        routers = (module for part in parts for module in part.modules())
        self._routers = [
            module
            for module in routers
            if rate > 0 and isinstance(module, Router) and module.spec.has_correction_bias
        ]
        # In mode reduce_scatter the ranks of a tensor-parallel group have tokens of their own.
        is_scattered = any(part.setting.is_scattered for part in parts if isinstance(part, Decoder))
        self._group = mesh.stage_group if is_scattered else mesh.dp_group

    @torch.no_grad()
    def step(self) -> None:
        """Moves the biases by the loads of a step, and forgets these. All ranks call it."""
        if not self._routers:
            return
        loads = torch.stack([_load(router) for router in self._routers])
        sum_over(loads, self._group)
        # Times the number of experts, so that all of it are integers.
        missing = loads.sum(1, keepdim=True) - loads * loads.shape[1]
        for router, direction in zip(self._routers, missing.sign(), strict=True):
            router.correction_bias.add_(direction, alpha=self._rate)
            router.load = None


def _load(router: Router) -> torch.Tensor:
    load = router.load
    return torch.zeros_like(router.correction_bias, dtype=torch.int64) if load is None else load
