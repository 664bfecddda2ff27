"""Converts checkpoints between Hugging Face and Nanotron, and speeds up Nanotron's training step.

    import nanotron_fast as nf
    nf.convert("meta-llama/Llama-2-7b-hf", "llama-7b-nanotron", topology=nf.Topology(tp=2, pp=2))

Importing this module changes nothing and imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanotron_fast.version import __version__

if TYPE_CHECKING:
    from nanotron_fast.conversion import Report, convert, plan
    from nanotron_fast.errors import NanotronFastError
    from nanotron_fast.inspection import inspect
    from nanotron_fast.loading import load_into
    from nanotron_fast.patch.registry import disable, enable, status
    from nanotron_fast.patch.transformers_models import disable_transformers, enable_transformers
    from nanotron_fast.planning.plan import Plan
    from nanotron_fast.topology import Topology
    from nanotron_fast.verification import verify

__all__ = [
    "NanotronFastError",
    "Plan",
    "Report",
    "Topology",
    "__version__",
    "convert",
    "disable",
    "disable_transformers",
    "enable",
    "enable_transformers",
    "inspect",
    "load_into",
    "plan",
    "status",
    "verify",
]

_HOMES = {
    "NanotronFastError": "errors",
    "Plan": "planning.plan",
    "Report": "conversion",
    "Topology": "topology",
    "convert": "conversion",
    "disable": "patch.registry",
    "disable_transformers": "patch.transformers_models",
    "enable": "patch.registry",
    "enable_transformers": "patch.transformers_models",
    "inspect": "inspection",
    "load_into": "loading",
    "plan": "conversion",
    "status": "patch.registry",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
