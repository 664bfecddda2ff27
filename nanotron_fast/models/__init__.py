"""Nanotron's models, one decoder assembled from a ModelSpec, on `nanotron_fast.parallel`.

import nanotron_fast.models
model = nanotron_fast.models.build("llama-hf", mesh=mesh)
loss = model(input_ids, labels=labels)

What is here is imported when it is asked for: an architecture and its facts need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanotron_fast.models.architecture import Architecture
    from nanotron_fast.models.building import build, load
    from nanotron_fast.models.decoder import Decoder
    from nanotron_fast.models.facts import Facts, facts_of
    from nanotron_fast.models.initial_weights import initialize

__all__ = ["Architecture", "Decoder", "Facts", "build", "facts_of", "initialize", "load"]

# No file has the name of a function: importing it would put the module in the function's place.
_HOMES = {
    "Architecture": "architecture",
    "Decoder": "decoder",
    "Facts": "facts",
    "build": "building",
    "facts_of": "facts",
    "initialize": "initial_weights",
    "load": "building",
}
_TORCH_FREE = ("Architecture", "Facts", "facts_of")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    from nanotron_fast.extras import require

    if name not in _TORCH_FREE:
        require("kernels", f"{__name__}.{name}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
