"""Another name for `nanotron_fast.kernels.glu`."""

from nanotron_fast.kernels.glu import (
    ACTIVATIONS,
    glu,
    glu_backward,
    glu_backward_reference,
    glu_forward,
    glu_reference,
)

__all__ = [
    "ACTIVATIONS",
    "glu",
    "glu_backward",
    "glu_backward_reference",
    "glu_forward",
    "glu_reference",
]
