"""The parts of grouped_gemm (its fork with permute and unpermute) that Nanotron uses."""

from . import ops

__nanotron_fast__ = True

__all__ = ["ops"]
