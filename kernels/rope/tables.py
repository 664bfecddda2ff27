"""Cosines and sines of rotary position embeddings, for every rope scaling of transformers.

    angle[p, i] = p * f[i],     cos = a * cos(angle),     sin = a * sin(angle)
    f[i] = theta^(-2i / rotary_dim) for "default"; each scaling bends f, yarn and longrope set a too

The frequencies are computed on the CPU in fp32 by the arithmetic of transformers 5, operation by
operation (`modeling_rope_utils.ROPE_INIT_FUNCTIONS`), so that they compare equal to a model's own
`inv_freq`. transformers 4 differs in one place: there yarn's and longrope's factor gives way to
max_position_embeddings / original_max_position_embeddings.

Shapes: f (rotary_dim/2,) fp32; cos, sin (num_positions, rotary_dim/2) fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Request:
    """What a scaling computes its frequencies from."""

    kind: str
    head_dim: int
    partial_rotary_factor: float
    theta: float
    seq_len: int
    max_position_embeddings: int | None
    scaling: Mapping[str, Any]

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    def get(self, key: str) -> Any:
        """A field of the scaling that must be there."""
        value = self.scaling.get(key)
        if value is None:
            raise ValueError(f"rope scaling {self.kind!r} needs {key!r}; it has {[*self.scaling]}")
        return value

    def max_positions(self) -> int:
        if self.max_position_embeddings is None:
            raise ValueError(f"rope scaling {self.kind!r} needs max_position_embeddings")
        return self.max_position_embeddings

    def original_positions(self) -> int:
        """The context the model was first trained with; the present one where none is given."""
        original = self.scaling.get("original_max_position_embeddings")
        return self.max_positions() if original is None else original

    def factor(self) -> float:
        """The scaling's factor, or the ratio of the two contexts."""
        factor = self.scaling.get("factor")
        if factor is not None:
            return factor
        return self.max_positions() / self.original_positions()


def _powers(theta: float, rotary_dim: int) -> Tensor:
    """theta^(2i / rotary_dim), the inverse of the plain frequencies."""
    return theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim)


def _default(request: _Request) -> tuple[Tensor, float]:
    return 1.0 / _powers(request.theta, request.rotary_dim), 1.0


def _linear(request: _Request) -> tuple[Tensor, float]:
    return _default(request)[0] / request.get("factor"), 1.0


def _dynamic(request: _Request) -> tuple[Tensor, float]:
    """NTK: a base that grows once the sequence is longer than max_position_embeddings."""
    dim, factor, positions = request.rotary_dim, request.get("factor"), request.max_positions()
    if dim <= 2:
        raise ValueError(f"rope scaling 'dynamic' needs a rotary dimension over 2, not {dim}")
    stretch = factor * max(request.seq_len, positions) / positions - (factor - 1)
    return 1.0 / _powers(request.theta * stretch ** (dim / (dim - 2)), dim), 1.0


def _yarn(request: _Request) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071): fast dimensions keep their frequency, slow ones are interpolated."""
    dim, theta, scaling = request.rotary_dim, request.theta, request.scaling
    factor, original = request.factor(), request.original_positions()

    def magnitude(scale: float = 1.0) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention_factor = magnitude()
        if mscale and mscale_all_dim:
            attention_factor = magnitude(mscale) / magnitude(mscale_all_dim)

    def dimension_of(num_rotations: float) -> float:
        """The dimension that turns so many times within the original context."""
        ratio = math.log(original / (num_rotations * 2 * math.pi))
        return dim * ratio / (2 * math.log(theta))

    low = dimension_of(scaling.get("beta_fast") or 32)
    high = dimension_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    powers = _powers(theta, dim)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept, float(attention_factor)


def _longrope(request: _Request) -> tuple[Tensor, float]:
    """LongRoPE: a factor for each frequency, one list for short sequences and one for long ones."""
    original = request.original_positions()
    key = "long_factor" if request.seq_len > original else "short_factor"
    factors = torch.tensor(request.get(key), dtype=torch.float32, device="cpu")
    powers = _powers(request.theta, request.rotary_dim)
    if factors.shape != powers.shape:
        raise ValueError(
            f"rope scaling 'longrope': {len(factors)} values in {key!r} for {len(powers)}"
        )
    attention_factor = request.scaling.get("attention_factor")
    if attention_factor is None:
        factor = request.factor()
        attention_factor = (
            math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        )
    return 1.0 / (factors * powers), float(attention_factor)


def _llama3(request: _Request) -> tuple[Tensor, float]:
    """Llama 3.1: long waves are stretched by the factor, short ones kept, blended in between."""
    factor, original = request.get("factor"), request.original_positions()
    low, high = request.get("low_freq_factor"), request.get("high_freq_factor")
    frequencies, _ = _default(request)
    wavelengths = 2 * math.pi / frequencies
    is_long, is_short = wavelengths > original / low, wavelengths < original / high
    share_kept = (original / wavelengths - low) / (high - low)
    blended = (1 - share_kept) * frequencies / factor + share_kept * frequencies
    stretched = torch.where(is_long, frequencies / factor, frequencies)
    return torch.where(is_long | is_short, stretched, blended), 1.0


def _proportional(request: _Request) -> tuple[Tensor, float]:
    """Gemma 4: all dimensions are pairs, but only the first part of the frequencies is not 0."""
    factor = request.scaling.get("factor") or 1.0
    num_turning = int(request.partial_rotary_factor * request.head_dim // 2)
    frequencies = torch.zeros(request.head_dim // 2, dtype=torch.float32, device="cpu")
    frequencies[:num_turning] = 1.0 / _powers(request.theta, request.head_dim)[:num_turning]
    return frequencies / factor, 1.0


_SCALINGS: dict[str, Callable[[_Request], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # longrope's name in the first Phi-3 checkpoints
    "llama3": _llama3,
    "proportional": _proportional,
}


def rope_frequencies(
    head_dim: int,
    theta: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    *,
    partial_rotary_factor: float = 1.0,
    max_position_embeddings: int | None = None,
    seq_len: int = 0,
) -> tuple[Tensor, float]:
    """Inverse frequencies (rotary_dim/2,), fp32 on the CPU, and the factor of cos and sin.

    Arguments and errors are those of `rope_tables`; `seq_len` 0 is any short sequence.
    """
    scaling = dict(scaling or {})
    if nested := [key for key, value in scaling.items() if isinstance(value, Mapping)]:
        raise ValueError(f"rope scaling of several layer types: pass one of {nested} alone")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in _SCALINGS:
        raise ValueError(f"unknown rope scaling {kind!r}: known are {', '.join(_SCALINGS)}")
    # What stands in the dictionary goes before the arguments, as in transformers.
    stated_theta, stated_part = scaling.get("rope_theta"), scaling.get("partial_rotary_factor")
    request = _Request(
        kind=kind,
        head_dim=head_dim,
        partial_rotary_factor=partial_rotary_factor if stated_part is None else stated_part,
        theta=float(theta if stated_theta is None else stated_theta),
        seq_len=seq_len,
        max_position_embeddings=max_position_embeddings,
        scaling=scaling,
    )
    if not 2 <= request.rotary_dim <= head_dim:
        raise ValueError(
            f"rope: {request.rotary_dim} rotary dimensions of head_dim {head_dim} "
            f"(partial_rotary_factor {request.partial_rotary_factor})"
        )
    return _SCALINGS[kind](request)


def rope_tables(
    head_dim: int,
    num_positions: int,
    theta: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    *,
    partial_rotary_factor: float = 1.0,
    max_position_embeddings: int | None = None,
    seq_len: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The tables that `rope_qkv` reads, for one context length and one rope scaling.

    Args:
        head_dim: of a head; the tables cover int(head_dim * partial_rotary_factor) of it.
        num_positions: rows of the tables.
        theta: the base, unless the scaling states `rope_theta`.
        scaling: `rope_scaling` of a transformers 4 configuration (`type` or `rope_type`), or
            `rope_parameters` of a transformers 5 one; None is "default". A configuration that
            keeps `original_max_position_embeddings` outside it (Phi-3) must put it in.
        partial_rotary_factor: share of a head that turns, unless the scaling states it.
        max_position_embeddings: of the configuration; dynamic needs it, and yarn, longrope and
            llama3 do where the scaling does not state the original context or, for the first two,
            the factor.
        seq_len: of the sequences to come, num_positions by default. dynamic's base and the
            choice between longrope's two lists depend on it; transformers decides it anew for
            each batch.
        device: of the tables.

    Returns:
        cos and sin (num_positions, rotary_dim/2), fp32, times the attention factor.

    Raises:
        ValueError: an unknown type, a missing field, sizes that do not fit.
    """
    frequencies, attention_factor = rope_frequencies(
        head_dim,
        theta,
        scaling,
        partial_rotary_factor=partial_rotary_factor,
        max_position_embeddings=max_position_embeddings,
        seq_len=num_positions if seq_len is None else seq_len,
    )
    frequencies = frequencies.to(
        device=device if device is not None else torch.get_default_device()
    )
    positions = torch.arange(num_positions, dtype=torch.float32, device=frequencies.device)
    angles = positions[:, None] * frequencies
    return angles.cos() * attention_factor, angles.sin() * attention_factor
