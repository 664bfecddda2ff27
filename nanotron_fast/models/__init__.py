"""Nanotron's models, one decoder assembled from a ModelSpec, on `nanotron_fast.parallel`."""

from __future__ import annotations

from nanotron_fast.models.architecture import Architecture
from nanotron_fast.models.decoder import Decoder
from nanotron_fast.models.facts import Facts, facts_of

__all__ = ["Architecture", "Decoder", "Facts", "facts_of"]
