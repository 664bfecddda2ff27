"""Converts checkpoints between Hugging Face and Nanotron, and speeds up Nanotron's training step.

    import nanotron_fast as nf
    nf.convert("meta-llama/Llama-2-7b-hf", "llama-7b-nanotron", topology=nf.Topology(tp=2, pp=2))

Importing this module changes nothing and imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanotron_fast.version import __version__

if TYPE_CHECKING:
    from nanotron_fast.checkpoints.carrying_out import Report
    from nanotron_fast.checkpoints.check_manifest import check_manifest
    from nanotron_fast.checkpoints.convert import convert, plan
    from nanotron_fast.checkpoints.inspect import inspect
    from nanotron_fast.checkpoints.load import load_into
    from nanotron_fast.checkpoints.plan.plan import Plan
    from nanotron_fast.checkpoints.reshard import reshard
    from nanotron_fast.checkpoints.verify import verify
    from nanotron_fast.errors import NanotronFastError
    from nanotron_fast.model.topology import Topology
    from nanotron_fast.patch.nanotron.registry import disable, enable, status
    from nanotron_fast.patch.transformers.models import disable_transformers, enable_transformers

__all__ = [
    "NanotronFastError",
    "Plan",
    "Report",
    "Topology",
    "__version__",
    "check_manifest",
    "convert",
    "disable",
    "disable_transformers",
    "enable",
    "enable_transformers",
    "inspect",
    "load_into",
    "plan",
    "reshard",
    "status",
    "verify",
]

_HOMES = {
    "NanotronFastError": "errors",
    "Plan": "checkpoints.plan.plan",
    "Report": "checkpoints.carrying_out",
    "Topology": "model.topology",
    "check_manifest": "checkpoints.check_manifest",
    "convert": "checkpoints.convert",
    "disable": "patch.nanotron.registry",
    "disable_transformers": "patch.transformers.models",
    "enable": "patch.nanotron.registry",
    "enable_transformers": "patch.transformers.models",
    "inspect": "checkpoints.inspect",
    "load_into": "checkpoints.load",
    "plan": "checkpoints.convert",
    "reshard": "checkpoints.reshard",
    "status": "patch.nanotron.registry",
    "verify": "models.verifying",
}
# What these need beside the converter's packages: names of extras.
_NEEDS = dict.fromkeys(
    (
        "disable",
        "disable_transformers",
        "enable",
        "enable_transformers",
        "load_into",
        "status",
    ),
    "kernels",
)


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    if name in _NEEDS:
        from nanotron_fast.extras import require

        require(_NEEDS[name], f"{__name__}.{name}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
