"""The nearest orthogonal matrix, nearly: the iteration of Newton and Schulz in Muon's coefficients.

    X <- X / |X|_F;  then so many times  G = X X^T,  X <- a X + (b G + c G G) X

It moves every singular value towards 1, and small ones fast rather than exactly: after five steps
most are between 0.7 and 1.2. Source: Keller Jordan, "Muon: An optimizer for hidden layers in neural
networks" (2024); torch.optim.Muon computes the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# The smallest norm that is divided by: a matrix of zeros stays one.
_SMALLEST_NORM = 1e-7


def orthogonal(matrices: Tensor, *, steps: int, dtype: torch.dtype) -> Tensor:
    """Makes matrices nearly orthogonal; they are left as they are.

    Args:
        matrices: (count, rows, columns).
        steps: iterations.
        dtype: of the products, and of the result.
    """
    a, b, c = COEFFICIENTS
    # The product with the transpose is of the shorter side.
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if is_tall else matrices).to(dtype)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / norm.clamp(min=_SMALLEST_NORM)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
