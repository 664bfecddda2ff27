"""Nanotron's models, one decoder assembled from a ModelSpec, on `nanotron_fast.parallel`.

model = nanotron_fast.models.build("llama-hf", mesh=mesh)
loss = model(input_ids, labels=labels)
"""

from __future__ import annotations

from nanotron_fast.models.architecture import Architecture
from nanotron_fast.models.build import build, load
from nanotron_fast.models.decoder import Decoder
from nanotron_fast.models.facts import Facts, facts_of
from nanotron_fast.models.initialize import initialize

__all__ = ["Architecture", "Decoder", "Facts", "build", "facts_of", "initialize", "load"]
