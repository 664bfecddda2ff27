"""How close a kernel must come to its fp64 reference, and the check itself.

An error is measured against the largest magnitude of the reference tensor: |ours - reference| <=
tolerance * max|reference|. Sums are in fp32 everywhere, so what is left is the rounding of inputs
that were computed and of the result: one unit in the last place of the dtype (2^-8 for bf16, 2^-11
for fp16), doubled because the interpreter truncates where a GPU rounds to nearest.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from nanotron_fast.kernels.runtime.backend import is_interpreting

# Whether kernels can be launched on tensors of the CPU: interpreted, or on the emulator of a GPU.
RUNS_ON_CPU = is_interpreting() or "EMULATOR_ARCH" in os.environ

# dtype of the result -> tolerance, for operations that round once.
TOLERANCES: dict[torch.dtype, float] = {
    torch.bfloat16: 2 * 2**-8,
    torch.float16: 2 * 2**-11,
    torch.float32: 2e-6,
}


def wide(tensor: Tensor | None, requires_grad: bool = False) -> Tensor | None:
    """An fp64 copy, a leaf of its own."""
    return None if tensor is None else tensor.detach().double().requires_grad_(requires_grad)


def assert_close(
    ours: Tensor,
    reference: Tensor,
    *,
    factor: float = 1.0,
    dtype: torch.dtype | None = None,
    floor: float = 1e-30,
) -> None:
    """Holds a result to the table. `factor`: how many roundings follow each other; say why.

    `dtype`: where a coarser dtype than the result's own set the precision. `floor`: an error that
    is always allowed, where terms of a known size cancel.
    """
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    if ours.numel() == 0:
        return
    tolerance = factor * TOLERANCES[dtype or ours.dtype]
    assert torch.isfinite(ours).all(), "not all finite"
    scale = reference.abs().max().item()
    error = (ours.double() - reference.double()).abs().max().item()
    assert error <= tolerance * scale + floor, (
        f"error {error:.3g} is {error / max(scale, 1e-300):.3g} of the largest value {scale:.3g}; "
        f"allowed {tolerance:.3g}"
    )
